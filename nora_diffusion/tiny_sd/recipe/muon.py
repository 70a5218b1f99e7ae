"""Muon, the optimizer of Jordan (2024), for hidden matrices. It needs far fewer steps than AdamW here.

Source: https://kellerjordan.github.io/posts/muon/
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Approximate the nearest semi-orthogonal matrix of ``g`` (m, n) by a quintic Newton-Schulz iteration.

    ``X <- P X`` with ``P = a I + b S + c S S`` and ``S = X X^T``; the singular values end near 1. Every ``P`` is a
    polynomial of the first ``S``. So the iteration runs on ``S <- P S P``, whose side is the shorter one of ``g`` (a
    third of the work for a convolution kernel), and ``X`` is multiplied once, by the product of all ``P``.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g.norm() + 1e-7)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    s = x @ x.T
    one = torch.eye(len(s), device=s.device, dtype=s.dtype)
    product = one
    for _ in range(steps):
        p = a * one + b * s + c * s @ s
        product, s = p @ product, p @ s @ p
    x = product @ x
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """Orthogonalized Nesterov momentum ``O``: ``W <- W - lr (0.2 sqrt(max(m, n)) O + wd W)``.

    Convolution kernels are reshaped to (out, in * h * w). With the factor 0.2 sqrt(max(m, n)) an update is as large as
    one of AdamW, so that both use the same learning rate (Liu et al. 2025, https://arxiv.org/abs/2502.16982).
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                scale = 0.2 * max(update.shape) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonalize(update).view_as(p), alpha=-group["lr"] * scale)
