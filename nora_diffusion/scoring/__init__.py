"""Score how close images are to a subject and to a prompt."""
