"""Mixtures: deltas whose experts are weighed by a learned gate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import functional


class RoutedDelta(nn.Module):
    """``dy = sum_i g_i(x) diag(b_i) B diag(a_i) A x`` with ``g = softmax(W_g x)``: MoR (arXiv 2410.13408).

    Shapes: ``A [r, d_in]``, ``B [d_out, r]``, ``a [N, r]``, ``b [N, d_out]``, ``W_g [N, d_in]``; all trained. The gate
    depends on the token, so there is no one ``dW``: such a delta cannot be merged and stays live.
    """

    mergeable = False

    def __init__(self, down: Tensor, up: Tensor, num_experts: int, dropout: float = 0.0) -> None:
        super().__init__()
        r, d_in = down.shape
        self.A = nn.Parameter(down)
        self.B = nn.Parameter(torch.zeros_like(up))
        # Ones plus noise: with equal scalings all experts would get equal gradients and never part ways.
        self.a = nn.Parameter(1 + 0.1 * torch.randn(num_experts, r))
        self.b = nn.Parameter(1 + 0.1 * torch.randn(num_experts, up.shape[0]))
        self.W_g = nn.Parameter(0.1 / math.sqrt(d_in) * torch.randn(num_experts, d_in))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, contract: functional.Contract) -> Tensor:
        gates = functional.router_gates(contract(x, self.W_g))
        return functional.routed_delta(self.dropout(contract(x, self.A)), gates, self.B, self.a, self.b)

    def skinny_weight(self) -> Tensor:
        return torch.cat([self.A, self.W_g])

    def from_skinny(self, p: Tensor) -> Tensor:
        r = self.A.shape[0]
        gates = functional.router_gates(p[..., r:])
        return functional.routed_delta(p[..., :r], gates, self.B, self.a, self.b)

    def delta_weight(self) -> Tensor:
        raise ValueError("a token-routed mixture (MoR) has no single dW: it cannot be merged or exported exactly")
