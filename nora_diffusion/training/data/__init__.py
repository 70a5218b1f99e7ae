"""Training data: subjects, images, prompts and their encodings."""
