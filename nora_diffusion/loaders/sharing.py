"""The frozen outer pairs of an adapter that is there, for a new one that shall share its basis."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import AdapterConfig
from ..adapters.deltas.bases import Pair
from ..adapters.tuner.build import flat_weight
from ..errors import UserError
from ..formats.keys import FROZEN, file_key, is_frozen
from ..pipelines.components import canonical
from .load import check_adapter

SETTLED = ("r", "rank_pattern", "basis", "placement", "power", "blocks", "basis_dtype")
"""What the numbers of a basis depend on, beside the base and the projections."""


def pairs_from(
    pipe: Any, path: str | Path, config: AdapterConfig, layers: Mapping[str, Mapping[str, nn.Module]]
) -> dict[str, dict[str, Pair]]:
    """``(A_out [r, d_in], B_out [d_out, r])`` of the adapter ``path`` for ``layers``, by component and module path.

    A basis that is computed again, in another precision or on another machine, is the same only up to rounding and
    signs; one that is taken over is equal to the bit, so that both adapters fit one shared file and one pack.

    Raises :class:`UserError` for an adapter of another base, of other basis settings or projections, and for a method
    that trains its outer pair.
    """
    if not config.frozen_outer or "down" in config.trained or ("up" in config.trained and config.starts_at_core):
        raise UserError(f"method {config.method!r} has no frozen basis that it could take from {path}")
    info, tensors = check_adapter(pipe, path)
    theirs = info.configs
    keys = {
        part: {p: tuple(file_key(part, canonical(p), factor) for factor in FROZEN) for p in paths}
        for part, paths in layers.items()
    }
    sides = 2 - ("up" in config.trained)  # a trained up factor starts at zero and needs no basis
    wanted = {key for pairs in keys.values() for pair in pairs.values() for key in pair[:sides]}
    held = {key for key in tensors if is_frozen(key)}
    if not held or not all(theirs[part].frozen_outer for part in theirs):
        raise UserError(f"{path} holds no frozen basis that could be shared")
    for part in layers:
        for name in SETTLED if part in theirs else ():
            if getattr(theirs[part], name) != getattr(config, name):
                raise UserError(
                    f"{path} has a basis of {name} = {getattr(theirs[part], name)}, this adapter would have "
                    f"{name} = {getattr(config, name)}: give both the same"
                )
    if any(set(theirs[part].trained) & {"down", "up"} != set(config.trained) & {"up"} for part in theirs):
        raise UserError(f"{path} freezes other factors than method {config.method!r}: take one of the same method")
    if odd := sorted(wanted ^ held):
        only = "the new one" if odd[0] in wanted else str(path)
        raise UserError(f"only {only} adapts {odd[0].rpartition('.')[0]}: give both the same targets and components")
    return {
        part: {p: (tensors[a], tensors[b] if sides == 2 else _zero_up(layers[part][p], tensors[a]))
               for p, (a, b) in pairs.items()}
        for part, pairs in keys.items()
    }  # fmt: skip


def _zero_up(layer: nn.Module, down: Tensor) -> Tensor:
    """An up factor ``[d_out, r]`` of zeros."""
    return torch.zeros(flat_weight(layer).shape[0], down.shape[0])
