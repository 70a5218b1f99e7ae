"""Plan a run before its first step: resolved settings, run folder, checkpoints and preflight checks."""
