"""Strategies: what ``--strategy`` does around the steps of a run."""
