"""Fingerprints of a base's weights: whether an adapter meets the weights that it was made for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .components import canonical

TOLERANCE = 1e-2
SAMPLES = 16

_KNOWN: WeakKeyDictionary[nn.Module, tuple[object, float]] = WeakKeyDictionary()
"""The last fingerprint of each layer, with what :func:`_state` returned then."""


def fingerprint(layer: nn.Module, path: str) -> float:
    """``u^T W v / sqrt(d_out d_in)`` with seeded normal ``u``, ``v``; nearly equal for fp16, bf16 and fp32 copies.

    For a quantized layer it is the value computed before quantization, which the layer keeps as ``true_fingerprint``
    (an attribute, so that copies and pickles of the layer keep it too). Computed once for a weight that stays.
    """
    if (stored := getattr(layer, "true_fingerprint", None)) is not None:
        return float(stored)
    weight, path = cast(Tensor, layer.weight).detach(), canonical(path)
    if type(weight) is not Tensor or weight.is_inference():  # such tensors do not count their changes
        return _compute(weight, path)
    state, known = _state(weight, path), _KNOWN.get(layer)
    if known is None or known[0] != state:
        known = _KNOWN[layer] = state, _compute(weight, path)
    return known[1]


def _state(weight: Tensor, path: str) -> object:
    """Changes with the weight. Assignments through ``.data`` count no version, so some values are compared too."""
    diagonal = weight.diagonal()
    values = diagonal[..., :: max(1, diagonal.shape[-1] // SAMPLES)].tolist()
    return path, weight.data_ptr(), weight._version, weight.dtype, weight.shape, values


def _compute(weight: Tensor, path: str) -> float:
    weight = weight.flatten(1).float()
    # Drawn on the CPU, so that all devices get the same u and v; the weight, gigabytes in a whole model, is not moved.
    generator = torch.Generator().manual_seed(sum(path.encode()))
    u, v = (torch.randn(size, generator=generator).to(weight.device) for size in weight.shape)
    return float(u @ weight @ v) / weight.numel() ** 0.5


def same_weights(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> bool:
    """Whether two models have the same weights, by fingerprints ``f`` and ``g``: ``||f - g|| <= 1e-2 ||g||``.

    Only the projections in ``theirs`` are compared. The tolerance accepts fp16, bf16 and fp32 copies of one model;
    the result is False if any value is not finite.
    """
    distance = math.dist([ours[key] for key in theirs], list(theirs.values()))
    return distance <= TOLERANCE * math.hypot(*theirs.values())
