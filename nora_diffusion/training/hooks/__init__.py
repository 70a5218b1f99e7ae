"""What rank allocations, strategies and mixtures do around the steps of a run."""
