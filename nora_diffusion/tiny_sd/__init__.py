"""The embedded base model ``tiny_sd``: its drawn world, the recipe that trains it, and its weights."""
