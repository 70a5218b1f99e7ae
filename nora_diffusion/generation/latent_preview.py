"""A cheap preview of latents: a linear map from latent channels to RGB, fitted once to the base's VAE."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ..pipelines.precision import in_fp32
from ..reports.webpage import data_uri

SAMPLES = 8
SIDE = 128


@dataclass
class LatentPreview:
    """``rgb = W^T [z, 1]`` for each latent pixel; ``weight`` is ``[channels + 1, 3]``, RGB in 0 to 1."""

    weight: Tensor

    @classmethod
    def fit(cls, vae: Any) -> LatentPreview:
        """Least squares over smooth random images: encoded latents against area-averaged pixels."""
        images = _smooth_images().to(next(vae.parameters()).device)
        with torch.no_grad(), in_fp32(vae):
            encoded = vae.encode(images * 2 - 1)
        latents = (encoded.latent_dist.mode() - _shift(vae)) * vae.config.scaling_factor
        small = functional.interpolate(images, latents.shape[-2:], mode="area")
        pixels = latents.float().movedim(1, -1).reshape(-1, latents.shape[1]).cpu()
        colors = small.float().movedim(1, -1).reshape(-1, 3).cpu()
        return cls(torch.linalg.lstsq(_with_ones(pixels), colors).solution)

    def rgb(self, latents: Tensor) -> Tensor:
        """Map ``[channels, h, w]`` to ``[3, h, w]`` in 0 to 1."""
        flat = _with_ones(latents.float().cpu().flatten(1).T)
        return (flat @ self.weight).clamp(0, 1).T.reshape(3, *latents.shape[1:])

    def image(self, latents: Tensor, ratio: float = 1.0) -> Image.Image:
        """The preview, one pixel for each latent pixel. ``ratio``: width by height, for Flux's packed latents."""
        if latents.ndim == 2:
            latents = _unpacked(latents, len(self.weight) - 1, ratio)
        return Image.fromarray((self.rgb(latents) * 255).round().byte().movedim(0, -1).numpy())

    def data_uri(self, latents: Tensor, ratio: float = 1.0) -> str:
        """The preview as a small PNG in a data URI."""
        return data_uri(self.image(latents, ratio), "PNG", compress_level=1)


def _with_ones(pixels: Tensor) -> Tensor:
    return torch.cat([pixels, torch.ones(len(pixels), 1)], dim=1)


def _unpacked(latents: Tensor, channels: int, ratio: float) -> Tensor:
    """``[h w / 4, 4 channels]``, the 2x2 patches of Flux, as ``[channels, h, w]``."""
    rows = round(math.sqrt(len(latents) / ratio))
    patches = latents.reshape(rows, -1, channels, 2, 2)
    return patches.permute(2, 0, 3, 1, 4).reshape(channels, 2 * rows, -1)


def _shift(vae: Any) -> float:
    return float(getattr(vae.config, "shift_factor", None) or 0.0)


def _smooth_images() -> Tensor:
    """``[SAMPLES, 3, SIDE, SIDE]`` images of soft colored patches at several scales."""
    generator = torch.Generator().manual_seed(0)
    coarse = [2 + index for index in range(SAMPLES)]
    images = [torch.rand(1, 3, size, size, generator=generator) for size in coarse]
    resized = [functional.interpolate(i, (SIDE, SIDE), mode="bilinear", align_corners=True) for i in images]
    return torch.cat(resized)
