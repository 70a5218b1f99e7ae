"""DyLoRA's rank mask (arXiv 2210.07558): every training step uses a random truncation of the adapter.

This orders the directions by importance: the first ``b`` of them are an adapter of rank ``b``, for every ``b`` up to
``r``.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn

from ...errors import UserError, quoted
from ..config import AdapterConfig
from ..deltas.chain import ChainDelta
from ..deltas.lease import Lease


def check_rank(config: AdapterConfig, rank: Any) -> int:
    """The rank as Python's own number. Raises :class:`UserError` if the adapter cannot be truncated to it."""
    if not config.rank_mask:
        raise UserError(
            f"method {config.method!r} was trained at one rank: only an adapter with a rank mask (dylora) has others"
        )
    most = config.middle_rank
    try:
        number = 0 if isinstance(rank, bool) else operator.index(rank)
    except TypeError:
        number = 0
    if not 1 <= number <= most:
        raise UserError(f"rank={quoted(rank)} is out of range for this adapter: choose 1 to {most}")
    return number


def masked_deltas(model: nn.Module) -> list[ChainDelta]:
    """The deltas of a model whose rank is sampled in training."""
    return [module for module in model.modules() if isinstance(module, ChainDelta) and module.masked]


def sample_ranks(model: nn.Module, args: tuple[Any, ...] = ()) -> None:
    """Draw one ``u`` in [0, 1) and give every masked delta in training mode the rank ``1 + floor(u r)``.

    A forward pre-hook of the adapted model: one draw per pass from torch's CPU generator for all layers, and none if no
    masked delta is in training. Gradient checkpointing recomputes layers but does not call this again.
    """
    training = [delta for delta in masked_deltas(model) if delta.training]
    if training:
        u = float(torch.rand((), device="cpu"))
        for delta in training:
            delta.sampled_rank = 1 + int(u * delta.full_rank)


def watch(model: nn.Module) -> None:
    """Sample ranks before each pass of the model, by one hook for all its adapters that ends with the last of them."""
    deltas = masked_deltas(model)
    lease = next((delta.lease for delta in deltas if delta.lease is not None), None)
    if lease is None:
        lease = Lease(model.register_forward_pre_hook(sample_ranks).remove)
    for delta in deltas:
        delta.lease = lease
