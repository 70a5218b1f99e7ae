"""The common form of all adapters for mixing: a low-rank update of each projection, without the base's weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ..adapters.deltas import functional
from ..adapters.deltas.chain import ChainDelta, Delta
from ..errors import UserError


@dataclass(frozen=True)
class Update:
    """``dW = up down``, or with a core between frozen outer factors ``dW = up core_up core_down down``.

    If only ``down`` is frozen (one-sided NoRA), the core has no ``core_up``: ``dW = up core_down down``. Shapes:
    ``down [r, d_in]``, ``core_down [k, r]``, ``core_up [r, k]``, ``up [d_out, r]`` (``[d_out, k]`` without
    ``core_up``). The adapter's scale ``alpha / r`` is folded into ``core_up``, or into ``up`` if there is none.
    """

    down: Tensor
    up: Tensor
    core: tuple[Tensor, Tensor | None] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)``."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """Inner dimension ``k`` of :meth:`pair`."""
        return self.down.shape[0] if self.core is None else self.core[0].shape[0]

    def pair(self) -> tuple[Tensor, Tensor]:
        """``(A [k, d_in], B [d_out, k])`` with ``dW = B A``, in fp64."""
        if self.core is None:
            return self.down.double(), self.up.double()
        core_down, up = self.behind_input()
        return core_down @ self.down.double(), up

    def behind_input(self) -> tuple[Tensor, Tensor]:
        """``(core_down [k, r], up [d_out, k])`` with ``dW = up core_down down``, in fp64; needs a core."""
        assert self.core is not None
        core_down, core_up = self.core
        up = self.up.double()
        return core_down.double(), up if core_up is None else up @ core_up.double()

    def dense(self) -> Tensor:
        """``dW [d_out, d_in]`` in fp64."""
        down, up = self.pair()
        return up @ down

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """``U [d_out, n]``, ``S [n]``, ``V [d_in, n]`` with ``dW = U diag(S) V^T`` and ``n <= k``, in fp64."""
        return functional.product_svd(*self.pair())

    def shared_sides(self, other: Update) -> int:
        """How many frozen outer factors both share, from the input on: 0, 1 (``down``) or 2."""
        if self.core is None or other.core is None or not torch.equal(self.down, other.down):
            return 0
        is_one_sided = self.core[1] is None or other.core[1] is None
        return 1 if is_one_sided or not torch.equal(self.up, other.up) else 2


def chain_update(delta: Delta, scale: float, owner: str) -> Update:
    """The update of one of our deltas. Raises :class:`UserError` for one with a magnitude (DoRA)."""
    assert isinstance(delta, ChainDelta), "routed adapters are refused by their config"
    if delta.m is not None:
        raise UserError(
            f"{owner} has a magnitude (DoRA): it rescales whole rows of the weight, which is not a low-rank dW to mix; "
            "activate it beside the others with set_adapters instead"
        )
    # A trained down factor is shared with no other adapter, and a rank mask truncates between the factors.
    if delta.core is None or delta.frozen_sides == 0 or delta.rank is not None:
        down, up = delta.pair()
        return Update(_plain(down), _plain(up) * scale)
    (down, up), (core_down, core_up) = delta.outer, delta.core_pair()
    if delta.frozen_sides == 1:
        up = up if core_up is None else up @ core_up
        return Update(_plain(down), _plain(up) * scale, (_plain(core_down), None))
    if core_up is None:
        core_up = torch.eye(core_down.shape[0])
    return Update(_plain(down), _plain(up), (_plain(core_down), _plain(core_up) * scale))


def lora_update(layer: LoraLayer, adapter_name: str) -> Update:
    """The update of a plain LoRA that diffusers loaded, at its own scale; the weight set for it is ignored.

    Raises :class:`UserError` for a LoRA with a magnitude (DoRA), a bias or another variant of PEFT.
    """
    tables: Any = layer
    up = tables.lora_B[adapter_name]
    if adapter_name in {*tables.lora_magnitude_vector, *getattr(tables, "lora_variant", {})} or up.bias is not None:
        raise UserError(
            f"{adapter_name!r} is more than a plain LoRA (DoRA, a bias ...), which is not a low-rank dW to mix"
        )
    r = tables.r[adapter_name]
    rank_stabilized = getattr(tables, "use_rslora", {}).get(adapter_name, False)
    scale = tables.lora_alpha[adapter_name] / (math.sqrt(r) if rank_stabilized else r)
    down = tables.lora_A[adapter_name]
    return Update(_plain(down.weight).flatten(1), _plain(up.weight).flatten(1) * scale)


def _plain(factor: Tensor) -> Tensor:
    return factor.detach().float().cpu()
