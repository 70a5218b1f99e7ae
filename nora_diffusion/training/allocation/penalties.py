"""Penalties on the factors of each layer, computed for all layers of one shape at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Penalty = Callable[[Tensor, Tensor], Tensor]
"""The penalty ``[n]`` of ``n`` pairs ``down [n, k, d_in]``, ``up [n, d_out, k]``."""

ORTHOGONALITY = 0.1
"""Weight of AdaLoRA's penalty (0.1 to 0.5 in the paper)."""
VARIANCE = 0.1
"""Weight of the penalty of DoRA with dynamic rank, as in its published code."""


def orthogonality(down: Tensor, up: Tensor) -> Tensor:
    """``||P^T P - I||_F^2 + ||Q Q^T - I||_F^2`` of ``P`` = up, ``Q`` = down. https://arxiv.org/abs/2303.10512"""
    eye = torch.eye(down.shape[1], device=down.device)
    return (up.mT @ up - eye).square().sum((1, 2)) + (down @ down.mT - eye).square().sum((1, 2))


def variance(down: Tensor, up: Tensor) -> Tensor:
    """The mean over the ranks of ``(Var(a_i) + Var(b_i)) / 2``, of the entries of each row of ``A``, column of ``B``.

    https://arxiv.org/abs/2405.17357
    """
    downs, ups = (x.var(dim, correction=min(1, x.shape[dim] - 1)) for x, dim in ((down, 2), (up, 1)))
    return (downs + ups).mean(1) / 2


def mean_penalty(penalty: Penalty, groups: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> Tensor:
    """The mean over all layers. ``groups``: the pairs of the layers, those of one shape together."""
    values = [penalty(*(torch.stack(factors) for factors in zip(*group, strict=True))) for group in groups]
    return torch.cat(values).mean()
