"""A weighted sum of adapters as one plain LoRA: PEFT's ``add_weighted_adapter``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import UserError, quoted
from ..config import AdapterConfig
from ..deltas import functional
from ..deltas.chain import ChainDelta
from ..patterns import pattern_of
from .layer import NoraLayer
from .peft_interface import check_weight

Pair = tuple[Tensor, Tensor]
KINDS = ("svd", "linear", "cat")


def weighted_pairs(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[Any], kind: str, rank: int | None
) -> dict[str, Pair]:
    """``(A [k, d_in], B [d_out, k])`` with ``B A = sum_i w_i s_i dW_i`` by path of the layer.

    ``linear`` and ``cat`` are exact; ``svd`` is the best approximation of rank ``rank`` (default: the largest rank of
    the adapters). Raises :class:`UserError` for an unknown adapter or kind, for weights and ranks out of range, and for
    an adapter with a router or a magnitude, which has no low-rank ``dW``.
    """
    if kind not in KINDS:
        raise UserError(f"combination_type={quoted(kind)} is unknown: use {', '.join(KINDS)}, or nora_diffusion.mix")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise UserError(f"svd_rank={quoted(rank)} is not a rank: give a whole number of at least 1")
    if not adapters or isinstance(adapters, str) or len(adapters) != len(weights):
        raise UserError("give a list of adapters and one weight for each")
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, NoraLayer)}
    for name in adapters:
        if not any(name in layer.nora_delta for layer in layers.values()):
            raise UserError(f"there is no adapter named {quoted(name)} to combine")
        for layer in layers.values():
            delta = layer.delta(name) if name in layer.nora_delta else None
            if delta is not None and not (isinstance(delta, ChainDelta) and delta.m is None):
                raise UserError(f"{name!r} has a router or a magnitude (DoRA) and no low-rank dW to combine")
    scales = {name: check_weight(name, weight) for name, weight in zip(adapters, weights, strict=True)}
    return {
        path.replace(".base_layer", ""): _pair(layer, scales, kind, rank)
        for path, layer in layers.items()
        if any(name in layer.nora_delta for name in scales)
    }


def _pair(layer: NoraLayer, scales: Mapping[str, float], kind: str, rank: int | None) -> Pair:
    names = [name for name in scales if name in layer.nora_delta]
    pairs = [cast(ChainDelta, layer.delta(name)).pair() for name in names]
    down = torch.cat([a.detach().double() for a, _ in pairs])
    up = torch.cat(
        [scales[n] * layer.scaling[n] * b.detach().double() for n, (_, b) in zip(names, pairs, strict=True)], 1
    )
    u, s, v = functional.product_svd(down, up)
    k = min(len(s), rank or max(len(a) for a, _ in pairs)) if kind == "svd" else len(s)
    root = s[:k].sqrt()
    return (v[:, :k] * root).T, u[:, :k] * root


def lora_config(pairs: Mapping[str, Pair]) -> AdapterConfig:
    """The config of a LoRA with these pairs."""
    ranks = {path: len(down) for path, (down, _) in pairs.items()}
    r = max(ranks.values())
    return AdapterConfig(
        method="lora", r=r, basis="kaiming", core="none", inner_r=1, target_modules=sorted(pairs),
        rank_pattern={pattern_of(path): rank for path, rank in ranks.items() if rank != r},
    )  # fmt: skip
