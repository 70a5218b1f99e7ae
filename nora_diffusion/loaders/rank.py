"""Set the rank of an adapter that was trained for every rank (DyLoRA)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..adapters import NoraLayer
from ..adapters.deltas.chain import ChainDelta
from ..adapters.tuner.rank_mask import check_rank, masked_deltas
from ..errors import UserError
from ..pipelines.components import Modules, adapter_configs, components, nora_layers, refuse_merged
from .active import require_adapter, unknown_adapter
from .locking import one_at_a_time


@one_at_a_time
def set_rank(pipe: Any, adapter_name: str, rank: int | None = None) -> None:
    """Use only the first ``rank`` directions of an adapter; ``None`` uses all of them.

    The update becomes ``dW = (alpha/r) B[:, :rank] A[:rank]``; a saved file still holds all ranks.
    Raises :class:`UserError` for an adapter without a rank mask, for a rank outside its range, and while an adapter is
    fused.
    """
    cut_rank(components(pipe), adapter_name, rank)


def cut_rank(modules: Modules, adapter_name: str, rank: int | None) -> None:
    """:func:`set_rank` for components that the caller has resolved."""
    require_adapter(modules, adapter_name)
    layers = [layer for module in modules.values() for layer in nora_layers(module, adapter_name).values()]
    if not layers:
        raise unknown_adapter(modules, adapter_name)
    refuse_merged(modules)
    for module in modules.values():
        config = adapter_configs(module).get(adapter_name)
        if config is not None:
            rank = None if rank is None else check_rank(config, rank)
            check_rank(config, 1)
    before = {delta: delta.rank for layer in layers for delta in masked_deltas(layer.delta(adapter_name))}
    try:
        _set(layers, dict.fromkeys(before, rank))
    except UserError:  # a prepared model has no room for it
        _set(layers, before)
        raise


def _set(layers: Iterable[NoraLayer], ranks: Mapping[ChainDelta, int | None]) -> None:
    for delta, rank in ranks.items():
        delta.rank = rank
    for layer in layers:
        layer.refresh()
