"""Composition: mixing adapters, how much two of them overlap, and the tags that name them in prompts."""
