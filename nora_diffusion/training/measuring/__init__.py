"""Measures of a run on its way, and which step they choose."""
