"""The drawn world: the training data of the embedded base."""
