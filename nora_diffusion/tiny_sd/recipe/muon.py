"""Muon (Jordan 2024) for the matrices of a small network; on few cores it needs far fewer steps than AdamW."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix of ``g`` (m, n), roughly: quintic Newton-Schulz iteration.

    ``X <- P X`` with ``P = a I + b S + c S S`` and ``S = X X^T``; singular values end near 1. Every ``P`` is a
    polynomial of the first ``S``, so the iteration runs on ``S <- P S P`` (the shorter side squared: a third of the
    work for a convolution's kernel) and ``X`` is multiplied once, by the product of the ``P``.
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
    """Nesterov momentum, orthogonalized: ``W <- W - lr (0.2 sqrt(max(m, n)) O + wd W)``.

    Kernels of convolutions are read as (out, in * h * w). The factor 0.2 sqrt(max(m, n)) gives the update the
    size of an AdamW update, so that both take the same learning rate (Liu et al. 2025).
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
