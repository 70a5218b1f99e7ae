"""The rank of an adapter that was trained for all of them (DyLoRA)."""

from __future__ import annotations

from typing import Any

from ..adapters.tuner.rank_mask import check_rank, masked_deltas
from ..pipelines.components import adapter_configs, component, nora_layers, present, refuse_merged
from .active import unknown_adapter
from .locking import one_at_a_time


@one_at_a_time
def set_rank(pipe: Any, adapter_name: str, rank: int | None = None) -> None:
    """Use only the first ``rank`` directions of an adapter; ``None``: all of them again.

    Exact: the adapter then is ``dW = (alpha/r) B[:, :rank] A[:rank]``, and a file saved from it still holds all ranks.
    Raises :class:`UserError` for an adapter without a rank mask, a rank it does not have, or while one is fused.
    """
    layers = {part: nora_layers(component(pipe, part), adapter_name) for part in present(pipe)}
    if not any(layers.values()):
        raise unknown_adapter(pipe, adapter_name)
    refuse_merged(pipe)
    for part in layers:
        config = adapter_configs(component(pipe, part)).get(adapter_name)
        if config is not None:
            check_rank(config, 1 if rank is None else rank)
    for group in layers.values():
        for layer in group.values():
            for delta in masked_deltas(layer.delta(adapter_name)):
                delta.rank = rank
