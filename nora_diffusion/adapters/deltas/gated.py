"""Frozen experts with a learned gate that reads their outputs (MoLE, arXiv 2404.13628)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import functional
from .routed import FrozenExperts, RoutedDelta

Listener = Callable[[Tensor], None]
"""Called with the gates ``[..., N]`` of a pass."""


class GatedDelta(RoutedDelta):
    """``dy = sum_i g_i E_i x`` over frozen adapters ``E_i``, with ``g = softmax(W_g n)``, ``W_g [N, N r]`` trained.

    ``n`` is what all experts add, normalized: ``n = [E_1 x; ...; E_N x] / ||.||`` in MoLE. Its gate only ever sees the
    span of the frozen up factors, so ``n`` is written in their orthonormal columns,
    ``n = [P_1 x; ...; P_N x] / ||.||``: ``N r`` numbers a position instead of ``N d_out``. The scale of
    ``W_g`` is MoLE's learned temperature.

    Router ``outputs``: one gate per position. ``pooled_outputs``: one per row, of the mean of ``n`` over the positions,
    as in MoLE. It starts at zero: all experts have the same share.
    """

    def __init__(self, experts: FrozenExperts, num_experts: int, router: str, dropout: float = 0.0) -> None:
        super().__init__(experts, num_experts, router, num_experts * experts.r, dropout)
        nn.init.zeros_(self.W_g)
        self.listener: Listener | None = None

    @property
    def conditioned(self) -> bool:
        """Never: a gate of a row reads what the layer adds to this row."""
        return False

    @property
    def fuses(self) -> bool:
        """Never: the gate needs ``p`` first."""
        return False

    def skinny_weight(self) -> Tensor:
        """``A [N r, d_in]``."""
        return self.experts.A

    def from_skinny(self, p: Tensor, rows: Tensor | None = None) -> Tensor:
        """``dy [..., d_out]`` from ``p = A x``."""
        logits = self._logits(p)
        if self.listener is not None:
            self.listener(functional.router_gates(logits))
        if self.router == "outputs":
            return self.experts.mix(torch.cat([p, logits.to(p.dtype)], dim=-1))
        ups = self.experts.up_for(functional.router_gates(logits)).to(p.dtype)
        return functional.rowwise(p, ups.transpose(1, 2))

    def _logits(self, p: Tensor) -> Tensor:
        """``W_g n``, at least in fp32: ``[..., N]`` by position, or ``[rows, N]``."""
        n = functional.at_least_single(p)
        n = n / n.square().sum(-1, keepdim=True).clamp_min(torch.finfo(n.dtype).tiny).sqrt()
        if self.router != "outputs" and n.ndim > 2:
            n = n.flatten(1, -2).mean(1)
        return n @ self.W_g.to(n.dtype).T

    def gates(self, x: Tensor, contract: functional.Contract) -> Tensor:
        """The gates of an input, at least in fp32: ``[..., N]`` by position, or ``[rows, N]``."""
        return functional.router_gates(self._logits(contract(x, self.experts.A)))
