"""One run from start to end, and its folder."""
