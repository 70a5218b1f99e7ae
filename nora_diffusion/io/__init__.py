"""Files: atomic writes, locks, untrusted safetensors, the disk cache, the layout of a run folder."""
