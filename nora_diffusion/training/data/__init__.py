"""What a run learns from: subjects, images, prompts, and their encodings."""
