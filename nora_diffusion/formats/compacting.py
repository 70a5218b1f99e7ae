"""Compact adapters: scales of ranks folded into the factors, and without the ranks that add nothing."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from ..adapters import AdapterConfig
from ..adapters.deltas.chain import rank_weights
from ..adapters.patterns import pattern_of
from ..errors import UserError
from .adapter_writing import Contents, Part

Factors = dict[str, Tensor]


def compacted(contents: Contents) -> Contents:
    """The same adapter with each layer at the rank that it uses.

    A rank is left out if its row of the lower factor or its column of the upper one is zero, and a layer if no rank is
    left. The scales of the ranks are folded into the lower factor, so that the result is a plain pair with a
    ``rank_pattern`` (of a nested adapter an ``inner_rank_pattern``). Raises :class:`UserError` if nothing is left.
    """
    parts = {name: _part(part) for name, part in contents.items()}
    left = {name: part for name, part in parts.items() if part.layers}
    if not left:
        raise UserError("no rank of any layer is left, so the adapter would do nothing: train with more ranks")
    return left


def _part(part: Part) -> Part:
    layers = {path: _used_ranks(part.config, factors) for path, factors in part.layers.items()}
    kept = {path: factors for path, factors in layers.items() if rank_of(factors)}
    if not kept:
        return Part(part.config, {})
    config = config_of_ranks(part.config, kept)
    if len(kept) < len(layers):
        config = replace(config, target_modules=sorted(kept), exclude_modules=None)
    return Part(config, kept)


def narrow_names(factors: Collection[str]) -> tuple[str, str]:
    """The names of the factors below and above the narrowest point of a chain."""
    return ("A_in" if "A_in" in factors else "A"), ("B_in" if "B_in" in factors else "B")


def rank_of(factors: Factors) -> int:
    """The rank of one layer, at the narrowest point of its chain."""
    return len(factors[narrow_names(factors)[0]])


def _used_ranks(config: AdapterConfig, factors: Factors) -> Factors:
    lower, upper = narrow_names(factors)
    down, up = factors[lower], factors[upper]
    if "l" in factors:
        down = rank_weights(factors["l"], config.rank_scales).unsqueeze(1) * down
    used = down.any(1) & up.any(0)
    if config.magnitude and not used.any():
        used = torch.arange(len(used), device=used.device) == 0  # its magnitude is trained
    rest = {name: value for name, value in factors.items() if name != "l"}
    return rest | {lower: down[used].contiguous(), upper: up[:, used].contiguous()}


def config_of_ranks(config: AdapterConfig, layers: dict[str, Factors]) -> AdapterConfig:
    """The config of an adapter with the ranks of these factors, at unchanged ``alpha / r``, without scales of ranks."""
    return config_with_ranks(replace(config, rank_scales="none"), {path: rank_of(own) for path, own in layers.items()})


def config_with_ranks(config: AdapterConfig, ranks: dict[str, int]) -> AdapterConfig:
    """``config`` with these ranks by path, at the narrowest point of the chain, at unchanged ``alpha / r``."""
    if config.has_inner_rank:
        ranks = {path: min(rank, config.rank_for(path)) for path, rank in ranks.items()}
    most = max(ranks.values())
    pattern = {pattern_of(path): rank for path, rank in ranks.items() if rank != most}
    if config.has_inner_rank:
        return replace(config, inner_r=most, inner_rank_pattern=pattern)
    scales = {path: config.scale_for(path) for path in ranks}
    if config.alpha is None and not config.alpha_pattern:
        return replace(config, r=most, rank_pattern=pattern)
    alphas = {pattern_of(path): scales[path] * rank for path, rank in ranks.items()}
    return replace(config, r=most, rank_pattern=pattern, alpha_pattern=alphas)
