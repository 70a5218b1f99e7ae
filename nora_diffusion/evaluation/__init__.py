"""Evaluate adapters: image grids, the DreamBooth protocol, and what an adapter does to the weights."""
