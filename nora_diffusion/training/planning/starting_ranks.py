"""The ranks with which an adapter starts whose ranks move while it trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...adapters import AdapterConfig
from ...formats.compacting import config_with_ranks
from ..settings.rank_allocations import RankStart

SHALLOWEST, DEEPEST = 0.5, 1.5
"""Ranks of the first and the last layer by the mean: 4 and 12 for 8 in PRILoRA (arXiv 2401.11316)."""
LATE = {"mid_block": 1, "up_blocks": 2, "conv_out": 2}
"""Parts of a UNet behind its down blocks, in the order of a pass."""


def starting_config(config: AdapterConfig, start: RankStart, paths: Mapping[str, Sequence[str]]) -> AdapterConfig:
    """``config`` with the ranks of the start, at the ``alpha / r`` of each layer.

    ``paths``: of the layers, by component. Where the method has inner ranks it is these, at most the outer rank.
    """
    layers = [path for own in paths.values() for path in own]
    scaled = replace(config, rank_scales=start.scales)
    if start.by_depth:
        ranks: dict[str, int] = {}
        for own in paths.values():
            for path, share in depth_shares(own).items():
                ranks.setdefault(path, max(1, int(share * _mean(config, path) + 0.5)))
        return config_with_ranks(scaled, ranks)
    if start.factor == 1:
        return scaled
    return config_with_ranks(scaled, {path: math.ceil(start.factor * _mean(config, path)) for path in layers})


def _mean(config: AdapterConfig, path: str) -> int:
    return config.inner_rank_for(path) if config.has_inner_rank else config.rank_for(path)


def depth_shares(paths: Sequence[str]) -> dict[str, float]:
    """Ranks by the mean rank, that grow linearly with the position of a layer, of mean 1."""
    ordered = in_order_of_depth(paths)
    if len(ordered) == 1:
        return {ordered[0]: (SHALLOWEST + DEEPEST) / 2}
    step = (DEEPEST - SHALLOWEST) / (len(ordered) - 1)
    return {path: SHALLOWEST + number * step for number, path in enumerate(ordered)}


def in_order_of_depth(paths: Sequence[str]) -> list[str]:
    """The paths of a model's layers, in its own order, in the order of a pass."""
    return sorted(paths, key=part_of_pass)


def part_of_pass(path: str) -> int:
    """Which part of a pass a layer is in: a UNet registers its middle block after the up blocks."""
    return LATE.get(path.partition(".")[0], 0)
