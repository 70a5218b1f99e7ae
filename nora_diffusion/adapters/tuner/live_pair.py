"""The inference path: all chains that a layer adds now as one cached LoRA pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..deltas import functional
from ..deltas.joining import ScaledChain, joined_pair


class LivePair:
    """``(A [K, d_in], B [d_out, K])`` of the live chains in the dtype of the pass.

    Kept until a factor, scale, rank or dtype changes, or the set of chains: one product down and one up then serve any
    number of adapters. It takes ``K (d_in + d_out)`` numbers beside the factors.
    """

    def __init__(self) -> None:
        self._chains: list[ScaledChain] = []
        self._tables: list[dict[str, Any]] = []
        self._key: object = None
        self._pair: tuple[Tensor, Tensor] | None = None

    def get(self, chains: Sequence[ScaledChain], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The pair of one or more chains."""
        if chains != self._chains:
            self.clear()
            modules = [module for _, chain in chains for module in chain.modules()]
            self._chains, self._tables = [*chains], [t for m in modules for t in (m._parameters, m._buffers) if t]
        # Asked in every pass of every layer, so it reads the tables of nn.Module without its slow lookup.
        factors = [factor for table in self._tables for factor in table.values()]
        key = dtype, [chain.rank for _, chain in chains], functional.versions(factors)
        if self._pair is None or key != self._key:
            with functional.without_autocast(factors[0].device):
                down, up = joined_pair(chains)
            self._key, self._pair = key, (down.to(dtype), up.to(dtype))
        return self._pair

    def clear(self) -> None:
        """Forget the pair and its chains, and free their memory."""
        self._chains, self._tables, self._key, self._pair = [], [], None, None


def add_product(y: Tensor, p: Tensor, up: Tensor, *, in_place: bool) -> Tensor:
    """``y + p B^T`` in one pass, for ``y [..., d_out]``, ``p [..., K]`` and ``B [d_out, K]``."""
    rows, update = y.reshape(-1, y.shape[-1]), p.reshape(-1, p.shape[-1])
    out = rows.addmm_(update, up.T) if in_place else torch.addmm(rows, update, up.T)
    return out.view(y.shape)


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether calling a layer is ``F.linear`` with its weight and nothing else: no subclass, hook or wrapper."""
    return (
        type(layer) is nn.Linear
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not layer._backward_hooks
        and not layer._backward_pre_hooks
        and "forward" not in vars(layer)  # replaced by an offloading or casting hook
        and not hasattr(layer.weight, "__tensor_flatten__")  # a quantized or distributed tensor
    )
