"""Activation statistics: how strongly each input channel of a projection fires on ordinary prompts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

GENERIC_PROMPTS = (
    "a dog in the grass",
    "a red car on the road",
    "a cup on a wooden table",
    "a bird in the sky",
    "a house in the snow",
    "a flower on a blue background",
    "a portrait of a person at night",
    "a boat on the sea at sunset",
)
"""Prompts of no subject in particular: a basis calibrated on them can be shared by all subjects."""
STEPS = 4


class _MeanAbs:
    """Running mean of ``|x|`` per input channel of one layer."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().float().abs()
        x = x.movedim(1, -1) if isinstance(module, nn.Conv2d) else x
        rows = x.flatten(0, -2)
        self.total = rows.sum(0) if self.total is None else self.total + rows.sum(0)
        self.count += rows.shape[0]

    def mean(self) -> Tensor:
        assert self.total is not None
        return self.total / self.count


def activation_strengths(
    pipe: Any, layers: dict[str, dict[str, nn.Module]], prompts: Sequence[str] | None = None
) -> dict[str, dict[str, Tensor]]:
    """``mean |x|`` per input channel ``[d_in]`` of each layer, by component and path.

    One short seeded sampling run (4 steps, guidance 5) feeds the layers their real inputs.
    """
    meters = {name: {path: _MeanAbs() for path in paths} for name, paths in layers.items()}
    with ExitStack() as stack:
        for name, paths in layers.items():
            for path, layer in paths.items():
                stack.callback(layer.register_forward_pre_hook(meters[name][path]).remove)
        _sample(pipe, list(prompts or GENERIC_PROMPTS))
    return {
        name: {path: meter.mean() for path, meter in group.items() if meter.count} for name, group in meters.items()
    }


def _sample(pipe: Any, prompts: list[str]) -> None:
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        with torch.no_grad():
            pipe(
                prompt=prompts, num_inference_steps=STEPS, guidance_scale=5.0, output_type="latent",
                generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
    finally:
        pipe.set_progress_bar_config(**bar)
