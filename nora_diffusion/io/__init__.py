"""Files: whole writes, locks, safetensors of unknown origin, caches, the layout of a run."""
