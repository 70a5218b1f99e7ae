"""DoRA's magnitude (arXiv 2402.09353): ``W' = m * (W + s dW) / ||W + s dW||``, row by row.

The adapter sets the direction of each output row; its length ``m [d_out]`` is trained separately. As a change of the
frozen weight: ``dW_eff = (c - 1) W + c s dW`` with ``c = m / ||W + s dW||``.
"""

from __future__ import annotations

from torch import Tensor

from . import functional

SMALLEST = 1e-12
"""Norms are at least this, so that a row of zeros stays zero."""


def row_norms(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """``||W + s B A||`` of each row ``[d_out]``, at least in fp32, without the dense ``B A [d_out, d_in]``.

    The root of ``||W||^2 + 2 s <W, B A> + s^2 ||B A||^2`` by row; both products need rank-``r`` matrices only.
    """
    weight = functional.at_least_single(weight)
    down, up = down.to(weight.dtype), up.to(weight.dtype)
    cross = ((weight @ down.T) * up).sum(1)
    own = ((up @ (down @ down.T)) * up).sum(1)
    return (weight.square().sum(1) + 2 * scale * cross + scale**2 * own).clamp(min=SMALLEST**2).sqrt()


def start_magnitude(weight: Tensor) -> Tensor:
    """The initial ``m = ||W||`` of each row: with ``dW = 0`` the weight is unchanged."""
    empty = weight.new_zeros(0, weight.shape[1]), weight.new_zeros(weight.shape[0], 0)
    return row_norms(weight, *empty, scale=0.0)
