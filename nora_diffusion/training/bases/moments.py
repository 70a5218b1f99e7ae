"""The outer pair that holds most of what several updates of one projection have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...adapters.deltas.bases import Pair, truncated_svd


@dataclass(frozen=True)
class Learned:
    """A trained LoRA pair of one projection: ``A [k, d_in]``, ``B [d_out, k]``, and the ``A`` from which it started."""

    down: Tensor
    up: Tensor
    start: Tensor

    def left(self) -> Tensor:
        """``L [d_out, k]`` with ``L L^T = dW dW^T`` for ``dW = B A``: with ``A^T = Q R``, ``L = B R^T``."""
        return self.up.double() @ torch.linalg.qr(self.down.double().T).R.T

    def right(self) -> Tensor:
        """``M [k, d_in]`` with ``M^T M = dV^T dV`` for what ``A`` learned, ``dV = B (A - A_0)``.

        ``A_0`` is random, and its part of the update's row space is noise. With ``B = Q R``, ``M = R (A - A_0)``.
        """
        return torch.linalg.qr(self.up.double()).R @ (self.down.double() - self.start.double())


Subject = Mapping[str, Learned]
"""The updates of one pseudo-subject by projection."""


def learned_pairs(subjects: Sequence[Subject], ranks: Mapping[str, int]) -> dict[str, Pair]:
    """``(A_out [r, d_in], B_out [d_out, r])`` of each projection, with orthonormal rows and columns.

    ``B_out`` are the ``r`` leading eigenvectors of ``sum_s dW_s dW_s^T / n_s^2`` and ``A_out`` those of
    ``sum_s dV_s^T dV_s / m_s^2``, where the norms ``n_s``, ``m_s`` over all projections keep one subject from
    dominating. Computed as singular vectors of the stacked factors, so no ``d x d`` matrix is formed.
    ``ranks``: ``r`` by projection, at most the stacked factors' ``sum_s k_s``.
    """
    lefts = [{path: update.left() for path, update in subject.items()} for subject in subjects]
    rights = [{path: update.right() for path, update in subject.items()} for subject in subjects]
    for factors in (*lefts, *rights):
        _normalize(factors)
    pairs = {}
    for path, r in ranks.items():
        up, _, _ = truncated_svd(torch.cat([left[path] for left in lefts], 1), r)
        _, _, down = truncated_svd(torch.cat([right[path] for right in rights]), r)
        pairs[path] = (down.contiguous(), up.contiguous())
    return pairs


def _normalize(factors: dict[str, Tensor]) -> None:
    """Scale one subject's factors to a norm of 1 over all projections."""
    norm = float(torch.stack([factor.norm() for factor in factors.values()]).norm())
    for path, factor in factors.items():
        factors[path] = factor / (norm or 1.0)
