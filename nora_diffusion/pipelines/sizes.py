"""Sizes of images in pixels that suit a pipeline."""

from __future__ import annotations

from typing import Any

from .components import denoiser


def native_side(pipe: Any) -> int:
    """The side of the square images that the base was trained on."""
    size = getattr(denoiser(pipe).config, "sample_size", None) or pipe.default_sample_size
    return int(size if isinstance(size, int) else size[0]) * scale_factor(pipe)


def side_multiple(pipe: Any) -> int:
    """What sides are multiples of: two latents, since transformers read latents in patches of two by two."""
    return 2 * scale_factor(pipe)


def scale_factor(pipe: Any) -> int:
    """Pixels per latent."""
    return int(getattr(pipe, "vae_scale_factor", 8))
