"""What the embedded base can do: follow prompts, and learn subjects with adapters."""
