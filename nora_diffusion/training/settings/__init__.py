"""Training settings: flags, YAML, defaults and checks."""
