"""Export of adapters to plain LoRA files, and import of LoRA files as adapters."""
