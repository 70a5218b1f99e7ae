"""Samples and validation scores during a run, and the choice of the step to save."""
