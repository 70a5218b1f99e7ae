"""Copy the frozen outer pairs of an adapter file, so that a new adapter can share its basis."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import AdapterConfig
from ..adapters.deltas.bases import Pair
from ..adapters.shapes import FROZEN
from ..adapters.tuner.build import flat_weight
from ..errors import UserError
from ..formats.keys import file_key
from ..pipelines.components import canonical
from .load import check_adapter

Pairs = Mapping[str, Mapping[str, Pair]]
"""``(A_out [r, d_in], B_out [d_out, r])`` by component and module path."""
BASIS_FIELDS = ("r", "rank_pattern", "basis", "placement", "power", "blocks", "basis_dtype")
"""Config fields that determine a basis, beside the base and the projections."""


def pairs_from(
    pipe: Any, path: str | Path, config: AdapterConfig, layers: Mapping[str, Mapping[str, nn.Module]]
) -> Pairs:
    """The outer pairs of the adapter ``path`` for ``layers``.

    A basis that is computed again, in another precision or on another machine, is equal only up to rounding and signs.
    A copied one is equal bit for bit, so that both adapters fit one shared file and one pack.

    A method with a trained up factor copies ``A_out`` only, which may be that of an adapter with both frozen. Of a
    learned basis, which is there to be used by any adapter, a part of the projections can be copied.

    Raises :class:`UserError` for an adapter of another base or with other basis settings or projections, and for a
    method that trains its outer pair.
    """
    if not config.frozen_outer or "down" in config.trained or ("up" in config.trained and config.starts_at_core):
        raise UserError(f"method {config.method!r} has no frozen basis that could be copied from {path}")
    info, tensors = check_adapter(pipe, path)
    theirs = info.configs
    keys = {
        component: {p: tuple(file_key(component, canonical(p), factor) for factor in FROZEN) for p in paths}
        for component, paths in layers.items()
    }
    sides = 2 - ("up" in config.trained)  # a trained up factor starts at zero and needs no basis
    wanted = {key for pairs in keys.values() for pair in pairs.values() for key in pair[:sides]}
    stored = {key for key in tensors if key.endswith(tuple(f".nora_{factor}" for factor in FROZEN[:sides]))}
    if not stored or not all(other.frozen_outer for other in theirs.values()):
        raise UserError(f"{path} has no frozen basis to share")
    for component in layers:
        for name in BASIS_FIELDS if component in theirs else ():
            if getattr(theirs[component], name) != getattr(config, name):
                raise UserError(
                    f"{path} has a basis with {name} = {getattr(theirs[component], name)}, but this adapter would have "
                    f"{name} = {getattr(config, name)}: use the same value for both"
                )
    if not all(set(other.trained) & {"down", "up"} <= set(config.trained) for other in theirs.values()):
        raise UserError(
            f"{path} freezes fewer factors than method {config.method!r}: use an adapter of the same method"
        )
    if different := sorted(wanted - stored if config.basis == "learned" else wanted ^ stored):
        only = "the new adapter" if different[0] in wanted else str(path)
        raise UserError(
            f"only {only} adapts {different[0].rpartition('.')[0]}: use the same targets and components for both"
        )
    return {
        component: {p: (tensors[a], tensors[b] if sides == 2 else _zero_up(layers[component][p], tensors[a]))
                    for p, (a, b) in pairs.items()}
        for component, pairs in keys.items()
    }  # fmt: skip


def _zero_up(layer: nn.Module, down: Tensor) -> Tensor:
    """An up factor ``[d_out, r]`` of zeros."""
    return torch.zeros(flat_weight(layer).shape[0], down.shape[0])
