"""Every setting of a run: flags, YAML, defaults, checks."""
