"""Scores: what ranks and layers are worth, as functions of weights, gradients, inputs and losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SENSITIVITY_DECAY = 0.85
"""``beta_1 = beta_2`` of AdaLoRA's published settings."""
Tensors = Sequence[Tensor]


def energy(gradient: Tensor) -> list[float]:
    """``sigma_i^2`` of a gradient ``[m, n]``, in descending order: the first-order gain of each rank.

    A step ``-eta G`` lowers the loss by ``eta ||G||_F^2 = eta sum_i sigma_i^2`` in first order, and its part of rank
    ``k`` by the ``k`` largest terms.
    """
    sigma: Tensor = torch.linalg.svdvals(gradient.double())
    return sigma.square().tolist()


def update_sensitivity(means: Tensors, spreads: Tensors, weights: Tensors, gradients: Tensors) -> None:
    """Update AdaLoRA's statistics of each weight in place.

    ``I = |w dL/dw|``, ``means = b means + (1 - b) I``, ``spreads = b spreads + (1 - b) |I - means|`` with the new
    means and ``b`` = :data:`SENSITIVITY_DECAY`. https://arxiv.org/abs/2303.10512 (eq. 9 to 11)
    """
    sensitivity = torch._foreach_mul(list(weights), list(gradients))
    torch._foreach_abs_(sensitivity)
    torch._foreach_lerp_(list(means), sensitivity, 1 - SENSITIVITY_DECAY)
    torch._foreach_sub_(sensitivity, list(means))
    torch._foreach_abs_(sensitivity)
    torch._foreach_lerp_(list(spreads), sensitivity, 1 - SENSITIVITY_DECAY)


def triplet_scores(scales: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """``s(l_i) + mean_j s(P_ji) + mean_j s(Q_ij)`` ``[k]`` from the scores of all weights of ``P diag(l) Q``.

    ``scales [k]``, ``up [m, k]``, ``down [k, n]``. https://arxiv.org/abs/2303.10512 (eq. 7)
    """
    return scales + up.mean(0) + down.mean(1)


def norm_shares(down: Tensor, up: Tensor) -> Tensor:
    """``||dW_i||_F / ||dW||_F`` ``[k]`` of the rank-1 parts ``dW_i = b_i a_i`` of ``dW = B A``; 0 where ``dW`` is 0.

    ``down [k, n]`` with the scales of the ranks, ``up [m, k]``. https://arxiv.org/abs/2405.17357
    """
    ups, downs = up.T @ up, down @ down.T
    norm = (ups * downs).sum().clamp(min=0).sqrt()
    return (ups.diagonal() * downs.diagonal()).sqrt() / norm.clamp(min=torch.finfo(norm.dtype).tiny)


def ablation(whole: float, without: float, alone: float) -> float:
    """``S(M) - S(M without i) + S(M with i alone)`` from losses, with ``S = -loss``: what rank ``i`` is worth.

    https://arxiv.org/abs/2403.16187
    """
    return without - whole - alone


def input_weighted(down: Tensor, norms: Tensor) -> Tensor:
    """``|A_ij| ||x_j||_2`` ``[k, n]`` for ``norms [n]`` of the inputs. https://arxiv.org/abs/2401.11316"""
    return down.abs() * norms
