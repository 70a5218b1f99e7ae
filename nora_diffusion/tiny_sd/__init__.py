"""The embedded base model ``tiny_sd``: its training data, training recipe, weights and measurements."""
