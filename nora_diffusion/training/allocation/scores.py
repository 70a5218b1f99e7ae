"""Scores: what each further rank of a layer is worth, from the gradient of its dense core."""

from __future__ import annotations

import torch
from torch import Tensor


def energy(gradient: Tensor) -> list[float]:
    """``sigma_i^2`` of a gradient ``[m, n]``, in descending order: the first-order gain of each rank.

    A step ``-eta G`` lowers the loss by ``eta ||G||_F^2 = eta sum_i sigma_i^2`` in first order, and its part of rank
    ``k`` by the ``k`` largest terms.
    """
    sigma: Tensor = torch.linalg.svdvals(gradient.double())
    return sigma.square().tolist()
