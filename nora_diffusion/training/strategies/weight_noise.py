"""Noise on the frozen weights of the adapted layers, for the time of a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters import NoraLayer
from ...adapters.deltas.functional import at_least_single


def frozen_weight(layer: NoraLayer) -> Tensor:
    """The weight of the frozen projection, ``[d_out, ...]``."""
    base: Any = layer.base_layer
    weight: Tensor = base.weight
    return weight


@torch.no_grad()
def with_noise(weight: Tensor, std: Tensor, source: torch.Generator) -> Tensor:
    """``W + std n`` with ``n ~ N(0, 1)``, in the shape and dtype of ``weight [d_out, ...]``.

    ``std``: of all values (a scalar), or of each output row, ``[d_out]``.
    """
    flat = at_least_single(weight).flatten(1)
    noise = torch.randn(flat.shape, generator=source, device=flat.device, dtype=flat.dtype)
    return (flat + std.view(-1, 1) * noise).view(weight.shape).to(weight.dtype)


def hardware_std(weight: Tensor, sigma: float) -> Tensor:
    """``sigma max(W)``: the cells of a memory span the range of the weights."""
    return sigma * at_least_single(weight.detach()).abs().max()


def noise_source(device: torch.device, seed: int) -> torch.Generator:
    """The generator of a step's noise. It is on the device: on the CPU, the values of a whole UNet take a second."""
    return torch.Generator(device).manual_seed(seed)


@contextmanager
def weights_replaced(weights: Mapping[NoraLayer, Tensor]) -> Iterator[None]:
    """Let layers compute with these weights instead of their frozen ones, wherever their adapters are not disabled.

    The frozen weights themselves are never written to: during the call of a layer another tensor stands in their
    place, also while gradient checkpointing computes it again, and after errors and Ctrl-C they are back.
    """
    with ExitStack() as stack:
        for layer, weight in weights.items():
            stack.enter_context(_weight_replaced(layer, nn.Parameter(weight, requires_grad=False)))
        yield


@contextmanager
def _weight_replaced(layer: NoraLayer, weight: nn.Parameter) -> Iterator[None]:
    base: Any = layer.base_layer
    frozen = base.weight

    def enter(*_: Any) -> None:
        if not layer.disable_adapters:
            base.weight = weight

    def leave(*_: Any) -> None:
        base.weight = frozen

    handles = layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        base.weight = frozen
