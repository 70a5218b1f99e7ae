"""Samples the noise and timesteps of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..settings.config import TimestepSampling, TrainConfig


def draw_noise(shape: torch.Size, config: TrainConfig, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise ``e`` of the target and noise of the input, both ``[B, C, H, W]``.

    ``e = z + noise_offset z'`` with one ``z'`` per channel, so that the model learns overall brightness
    (crosslabs.org/blog/diffusion-with-offset-noise). The input gets ``e + input_perturbation z''`` (arXiv 2301.11706),
    the target keeps ``e``. If both settings are 0, only ``z`` is sampled.
    """
    noise = torch.randn(shape, generator=source)
    if config.noise_offset > 0:
        noise = noise + config.noise_offset * torch.randn((*shape[:2], 1, 1), generator=source)
    if config.input_perturbation > 0:
        return noise, noise + config.input_perturbation * torch.randn(shape, generator=source)
    return noise, noise


def draw_timesteps(count: int, levels: range, sampling: TimestepSampling, source: torch.Generator) -> Tensor:
    """Sample ``count`` timesteps in ``levels [low, high)``.

    ``uniform``: independent. ``stratified``: one from each of ``count`` equal strata, shuffled, which lowers the
    gradient variance of small batches. ``logit_normal``: ``floor(n sigmoid(z))``, which favors the middle
    (arXiv 2403.03206).
    """
    if sampling == "uniform":
        return levels.start + torch.randint(0, len(levels), (count,), generator=source)
    if sampling == "stratified":
        positions = (torch.arange(count) + torch.rand(count, generator=source)) / count
        drawn = (positions * len(levels)).long().clamp(max=len(levels) - 1)
        return levels.start + drawn[torch.randperm(count, generator=source)]
    drawn = (torch.randn(count, generator=source).sigmoid() * len(levels)).long()
    return levels.start + drawn.clamp(max=len(levels) - 1)
