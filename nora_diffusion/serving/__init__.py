"""A serving engine: requests with different subjects share the passes of one base, step by step."""
