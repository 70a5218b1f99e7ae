"""``python -m nora_diffusion.tiny_sd.comparing``: compare methods on held-out subjects over rates and seeds."""
