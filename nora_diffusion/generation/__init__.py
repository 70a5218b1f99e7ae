"""From prompts with tags to images with their settings in the file."""
