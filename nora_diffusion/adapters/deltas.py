"""Deltas: what an adapter adds to the output of one frozen projection, in plain torch.

Every delta offers the same few verbs, so that layers, processors and exporters need not know the method:

- ``forward(x, contract)``: the training path, unscaled: ``dy [..., d_out]`` (channels last);
- ``skinny_weight()`` and ``from_skinny(p)``: the inference path; several projections of one input can share one
  product ``p = x [A1; A2; ...]^T``;
- ``delta_weight()``: the dense ``dW [d_out, d_in]`` where there is one (``mergeable``).

The scale ``alpha / r`` and the user's weight are applied by the layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .cores import DenseCore, NestedCore
from .routed import RoutedDelta

Core = NestedCore | DenseCore


def hold(module: nn.Module, name: str, value: Tensor, *, trained: bool) -> None:
    """Register ``value`` as what it is: a trained factor is a Parameter, a frozen one a buffer."""
    if trained:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value)


class ChainDelta(nn.Module):
    """``dy = B_out core(A_out x)``: LoRA without a core, LoRA-XS with a dense, NoRA with a nested one.

    Shapes: ``A_out [r, d_in]``, ``B_out [d_out, r]``. With a core the outer pair is frozen (buffers); autograd then
    keeps ``p = A_out x`` for backward and never ``x``. Dropout acts on ``p`` for the same reason.
    """

    mergeable = True

    def __init__(self, down: Tensor, up: Tensor, core: Core | None, dropout: float = 0.0) -> None:
        super().__init__()
        trained = core is None
        hold(self, "A" if trained else "A_out", down, trained=trained)
        hold(self, "B" if trained else "B_out", torch.zeros_like(up) if trained else up, trained=trained)
        self.core = core
        self.dropout = nn.Dropout(dropout)

    @property
    def outer(self) -> tuple[Tensor, Tensor]:
        """The outer pair ``(down, up)``."""
        names = ("A", "B") if self.core is None else ("A_out", "B_out")
        return getattr(self, names[0]), getattr(self, names[1])

    def pair(self) -> tuple[Tensor, Tensor]:
        """The plain LoRA pair of the same map: ``(A [k, d_in], B [d_out, k])``, in the factors' own dtype."""
        down, up = self.outer
        if self.core is None:
            return down, up
        core_down, core_up = self.core.pair()
        dtype = torch.promote_types(down.dtype, core_down.dtype)
        return functional.collapse(*(f.to(dtype) for f in (down, core_down, core_up, up)))

    def forward(self, x: Tensor, contract: functional.Contract) -> Tensor:
        down, up = self.outer
        p: Tensor = self.dropout(contract(x, down))
        if self.core is not None:
            core_down, core_up = self.core.pair()
            p = F.linear(F.linear(p, core_down.to(p.dtype)), core_up.to(p.dtype))
        return F.linear(p, up.to(p.dtype))

    def skinny_weight(self) -> Tensor:
        down, _ = self.outer
        return down if self.core is None else self.core.pair()[0].to(down.dtype) @ down

    def from_skinny(self, p: Tensor) -> Tensor:
        _, up = self.outer
        if self.core is not None:
            up = up @ self.core.pair()[1].to(up.dtype)
        return F.linear(p, up.to(p.dtype))

    def delta_weight(self) -> Tensor:
        """``dW = B A`` in fp32, without the scale."""
        down, up = self.pair()
        return up.float() @ down.float()


Delta = ChainDelta | RoutedDelta
