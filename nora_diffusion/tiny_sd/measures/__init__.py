"""What the embedded base can do: following prompts, learning subjects."""
