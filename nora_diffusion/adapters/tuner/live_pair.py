"""The inference path: all chains that a layer adds now as one cached LoRA pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..deltas import functional
from ..deltas.factor_state import FactorState
from ..deltas.joining import ScaledChain, joined_pair


class LivePair:
    """``(A [K, d_in], B [d_out, K])`` of the live chains in the dtype of the pass.

    Kept until a factor, scale, rank or dtype changes, or the set of chains: one product down and one up then serve any
    number of adapters. It takes ``K (d_in + d_out)`` values beside the factors.
    """

    def __init__(self) -> None:
        self._factors = FactorState()
        self._key: object = None
        self._pair: tuple[Tensor, Tensor] | None = None

    def get(self, chains: Sequence[ScaledChain], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The pair of one or more chains."""
        key = dtype, [scale for scale, _ in chains], self._factors.of([chain for _, chain in chains])
        if self._pair is None or key != self._key:
            with functional.without_autocast(next(chains[0][1].parameters()).device):
                down, up = joined_pair(chains)
            self._key, self._pair = key, (down.to(dtype), up.to(dtype))
        return self._pair

    def clear(self) -> None:
        """Forget the pair and its chains, and free their memory."""
        self._factors, self._key, self._pair = FactorState(), None, None


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
