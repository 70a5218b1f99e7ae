"""Deltas: what an adapter adds to the output of one frozen projection, in plain torch.

Every delta has the same methods, so that layers, attention processors and exporters need not know which method it is:

- ``forward(x, contract)``: the training path, unscaled: ``dy [..., d_out]`` (channels last);
- ``skinny_weight()`` and ``from_skinny(p)``: the inference path; several projections of one input can share one
  product ``p = x [A1; A2; ...]^T``;
- ``delta_weight()``: the dense ``dW [d_out, d_in]``, if ``mergeable``.

The layer applies the scale ``alpha / r`` and the user's weight.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..axes import RankScales
from . import functional
from .cores import Core, InputCore
from .fused import chained_linear
from .lease import Lease
from .magnitude import row_norms
from .routed import RoutedDelta
from .working import WorkingCopies

if TYPE_CHECKING:
    from typing_extensions import Self


SOFTMAX_TEMPERATURE = 0.05
"""The temperature of ``rank_scales="softmax"`` (BeamLoRA, arXiv 2502.13604)."""


def register_factor(module: nn.Module, name: str, value: Tensor, *, trained: bool, stored: bool = True) -> None:
    """Register a trained factor as a Parameter, a frozen one as a buffer.

    A frozen factor that depends on its shape only is not ``stored``: it is left out of the state dict.
    """
    if trained:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value, persistent=stored)


def rank_weights(scales: Tensor, kind: RankScales) -> Tensor:
    """The weights ``[k]`` of the ranks for ``l [k]``: ``l`` itself (``linear``), or ``k softmax(l / T)``."""
    return scales if kind == "linear" else len(scales) * torch.softmax(scales / SOFTMAX_TEMPERATURE, 0)


class ChainDelta(nn.Module):
    """``dy = B_out core(A_out x)``: LoRA without a core, LoRA-XS with a dense core, NoRA with a nested core.

    Shapes: ``A_out [r, d_in]``, ``B_out [d_out, r]``; with ``blocks = n`` both are block-diagonal and stored as stacked
    blocks ``[r, d_in / n]``, ``[d_out, r / n]``. A trained factor is a Parameter named ``A`` or ``B``, a frozen one a
    buffer named ``A_out`` or ``B_out``. With a frozen ``A_out`` autograd saves ``p = A_out x`` for backward instead of
    ``x``; dropout acts on ``p`` for the same reason. ``m [d_out]`` is DoRA's magnitude, or ``None``. ``l [k]`` scales
    the ``k`` ranks at the narrowest point, see :func:`rank_weights`.
    """

    mergeable = True

    def __init__(
        self,
        down: Tensor,
        up: Tensor,
        core: Core | None = None,
        dropout: float = 0.0,
        *,
        trained: Collection[str] = ("down", "up"),
        stored: bool = True,
        blocks: int = 1,
        magnitude: Tensor | None = None,
        masked: bool = False,
        rank_scales: RankScales = "none",
    ) -> None:
        super().__init__()
        # An adapter starts as a no-op: its core is zero, or without a core (or with an input core) its up factor.
        up = torch.zeros_like(up) if core is None or isinstance(core, InputCore) else up
        self._names = ("A" if "down" in trained else "A_out", "B" if "up" in trained else "B_out")
        register_factor(self, self._names[0], down, trained="down" in trained, stored=stored)
        register_factor(self, self._names[1], up, trained="up" in trained, stored=stored)
        self.core = core
        self.blocks = blocks
        self.m = None if magnitude is None else nn.Parameter(magnitude)
        self.rank_scales = rank_scales
        self.l = None if rank_scales == "none" else nn.Parameter(self._neutral_scales(down))
        self.masked = masked
        self.rank: int | None = None
        self.sampled_rank: int | None = None
        self.lease: Lease | None = None
        self.dropout = nn.Dropout(dropout)
        self.copies = WorkingCopies()

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module``; the working copies are freed after training."""
        if not mode:
            self.copies.clear()
        return super().train(mode)

    @property
    def stored_outer(self) -> tuple[Tensor, Tensor]:
        """The outer pair as it is stored: with ``blocks``, these are stacked."""
        return getattr(self, self._names[0]), getattr(self, self._names[1])

    @property
    def outer(self) -> tuple[Tensor, Tensor]:
        """The outer pair ``(down [r, d_in], up [d_out, r])``, dense if it is block-diagonal."""
        down, up = self.stored_outer
        if self.blocks == 1:
            return down, up
        return torch.block_diag(*down.chunk(self.blocks)), torch.block_diag(*up.chunk(self.blocks))

    @property
    def frozen_sides(self) -> int:
        """How many outer factors are frozen, from the input on: 2 of NoRA, 1 of one-sided NoRA, 0 of LoRA."""
        return (self._names == ("A_out", "B_out")) + (self._names[0] == "A_out")

    @property
    def full_rank(self) -> int:
        """The rank at the narrowest point of the chain: ``r'`` of a nested core, else ``r``."""
        return int((getattr(self, self._names[0]) if self.core is None else self.core.pair()[0]).shape[0])

    @property
    def working_rank(self) -> int | None:
        """The rank of the next pass: sampled if a masked adapter is in training, else the set ``rank``."""
        return self.sampled_rank if self.masked and self.training else self.rank

    @property
    def drops(self) -> bool:
        """Whether the next pass drops some of ``p``."""
        return self.training and self.dropout.p > 0

    @property
    def is_plain(self) -> bool:
        """Whether the next pass is ``dy = B A x`` for :meth:`pair`: no magnitude, sampled rank or active dropout."""
        return self.m is None and not self.drops and not (self.training and self.masked)

    @property
    def fuses(self) -> bool:
        """Whether :meth:`linear` serves the next pass."""
        return self.m is None and self.blocks == 1 and not self.drops

    def _neutral_scales(self, like: Tensor) -> Tensor:
        """The ``l [k]`` at which every rank has weight 1."""
        return like.new_full((self.full_rank,), float(self.rank_scales == "linear"), dtype=torch.float32)

    def rank_weights(self) -> Tensor | None:
        """The weight of each rank, ``[k]``, by :func:`rank_weights`; ``None`` if the ranks have no scales."""
        return None if self.l is None else rank_weights(self.l, self.rank_scales)

    def core_pair(self) -> tuple[Tensor, Tensor | None]:
        """The factors of the core below and above its narrowest point; the lower one includes the ranks' weights."""
        assert self.core is not None
        lower, upper = self.core.pair()
        weights = self.rank_weights()
        return (lower if weights is None else weights.unsqueeze(1) * lower), upper

    def halves(self, rank: int | None) -> tuple[list[Tensor], list[Tensor]]:
        """``([A_out, A_in], [B_in, B_out])``, truncated to ``rank`` at the narrowest point."""
        down, up = self.outer
        if self.core is None:
            weights = self.rank_weights()
            below, above = [down if weights is None else weights.unsqueeze(1) * down], [up]
        else:
            core_down, core_up = self.core_pair()
            below, above = [down, core_down], [up] if core_up is None else [core_up, up]
        if rank is not None:
            below[-1], above[0] = below[-1][:rank], above[0][:, :rank]
        return below, above

    def pair(self) -> tuple[Tensor, Tensor]:
        """The LoRA pair of the same map: ``(A [k, d_in], B [d_out, k])``, in the dtype of the factors."""
        below, above = self.halves(self.rank)
        return functional.collapse(below), functional.collapse(above)

    def forward(self, x: Tensor, contract: functional.Contract) -> Tensor:
        """``dy = B_out core(A_out x)``, ``[..., d_out]`` with channels last, unscaled."""
        below, above = self.halves(self.working_rank)
        p: Tensor = self.dropout(contract(x, below[0]))
        for factor in (*below[1:], *above):
            p = F.linear(p, factor.to(p.dtype))
        return p

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """``y = W x + b + s dy``, ``[..., d_out]``, for a frozen linear projection: the fast training path."""
        return chained_linear(x, weight, bias, *self.halves(self.working_rank), scale, self.copies)

    def skinny_weight(self) -> Tensor:
        """``A_in A_out [k, d_in]``."""
        return functional.collapse(self.halves(self.rank)[0])

    def from_skinny(self, p: Tensor) -> Tensor:
        """``dy [..., d_out]`` from ``p = A_in A_out x [..., k]``."""
        return F.linear(p, functional.collapse(self.halves(self.rank)[1]).to(p.dtype))

    def delta_weight(self) -> Tensor:
        """``dW = B A`` in fp32, unscaled."""
        down, up = self.pair()
        return up.float() @ down.float()

    def row_factors(self, weight: Tensor, scale: float, rank: int | None) -> Tensor:
        """DoRA's ``c = m / ||W + s dW|| [d_out]`` for the frozen ``W [d_out, d_in]``; needs a magnitude.

        The norm is constant in backward, as in section 4.3 of the paper.
        """
        assert self.m is not None
        with torch.no_grad(), functional.without_autocast(weight.device):
            down, up = (functional.collapse(factors) for factors in self.halves(rank))
            norms = row_norms(weight, down, up, scale)
        return self.m.to(norms.dtype) / norms


Delta = ChainDelta | RoutedDelta
