"""The frozen outer pairs of an adapter that is there, for a new one that shall share its basis."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..adapters import AdapterConfig
from ..adapters.deltas.bases import Pair
from ..errors import UserError
from ..formats.keys import FROZEN, is_frozen
from ..pipelines.components import canonical
from .inject import file_key
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
    if not config.frozen_outer:
        raise UserError(f"method {config.method!r} has no frozen basis that it could take from {path}")
    info, tensors = check_adapter(pipe, path)
    theirs = info.configs
    keys = {
        part: {p: tuple(file_key(part, canonical(p), factor) for factor in FROZEN) for p in paths}
        for part, paths in layers.items()
    }
    wanted = {key for pairs in keys.values() for pair in pairs.values() for key in pair}
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
    if odd := sorted(wanted ^ held):
        only = "the new one" if odd[0] in wanted else str(path)
        raise UserError(f"only {only} adapts {odd[0].rpartition('.')[0]}: give both the same targets and components")
    return {part: {p: (tensors[a], tensors[b]) for p, (a, b) in pairs.items()} for part, pairs in keys.items()}
