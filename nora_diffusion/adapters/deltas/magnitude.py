"""DoRA's magnitude (arXiv 2402.09353): ``W' = m * (W + s dW) / ||W + s dW||``, row by row.

The direction of each output row is what an adapter says, its length ``m [d_out]`` is trained on its own. As a change of
the frozen weight: ``dW_eff = (c - 1) W + c s dW`` with ``c = m / ||W + s dW||``.
"""

from __future__ import annotations

from torch import Tensor

from . import functional

SMALLEST = 1e-12
"""Norms are clamped to this, so that a row of zeros stays zero."""


def row_norms(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """``||W + s B A||`` of each row ``[d_out]``, at least in fp32, without forming ``B A [d_out, d_in]``.

    ``||W||^2 + 2 s <W, B A> + s^2 ||B A||^2`` row by row, where both products need rank-``r`` matrices only.
    """
    weight = functional.at_least_single(weight)
    down, up = down.to(weight.dtype), up.to(weight.dtype)
    cross = ((weight @ down.T) * up).sum(1)
    own = ((up @ (down @ down.T)) * up).sum(1)
    return (weight.square().sum(1) + 2 * scale * cross + scale**2 * own).clamp(min=SMALLEST**2).sqrt()


def start_magnitude(weight: Tensor) -> Tensor:
    """``m = ||W||`` by rows: with ``dW = 0`` nothing changes."""
    none = weight.new_zeros(0, weight.shape[1]), weight.new_zeros(weight.shape[0], 0)
    return row_norms(weight, *none, scale=0.0)
