"""``python -m nora_diffusion.tiny_sd.blending``: do two learned subjects blend in one image, and what prevents it?"""
