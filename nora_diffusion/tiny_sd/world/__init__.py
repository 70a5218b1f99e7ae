"""The drawn world that the embedded base is trained on."""
