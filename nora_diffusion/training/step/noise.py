"""What is drawn for each batch: the noise, what is added of it, and the noise levels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..settings.config import TrainConfig
from .randomness import draw_timesteps


def draw_noise(shape: torch.Size, config: TrainConfig, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """``(e, what is added)``, both ``[B, C, H, W]``.

    ``e = z + noise_offset z'`` with one ``z'`` for each channel, so that brightness is learned
    (crosslabs.org/blog/diffusion-with-offset-noise). Added is ``e + input_perturbation z''`` (arXiv 2301.11706),
    while the target keeps ``e``. Nothing more is drawn where both are 0.
    """
    noise = torch.randn(shape, generator=source)
    if config.noise_offset > 0:
        noise = noise + config.noise_offset * torch.randn((*shape[:2], 1, 1), generator=source)
    if config.input_perturbation > 0:
        return noise, noise + config.input_perturbation * torch.randn(shape, generator=source)
    return noise, noise


def draw_levels(count: int, total: int, config: TrainConfig, source: torch.Generator) -> Tensor:
    """``count`` levels in ``[min_timestep, max_timestep)`` of ``total``.

    ``logit_normal`` is ``floor(n sigmoid(z))``, which prefers the middle (arXiv 2403.03206); the others are those of
    :func:`.randomness.draw_timesteps`.
    """
    low, high = config.min_timestep, min(config.max_timestep or total, total)
    if config.timestep_sampling == "logit_normal":
        places = torch.randn(count, generator=source).sigmoid() * (high - low)
        return low + places.long().clamp(max=high - low - 1)
    return low + draw_timesteps(count, high - low, config.timestep_sampling == "stratified", source)
