"""How the factors of several clients become one adapter: plain functions on pairs, without the dense ``dW``.

Client ``k`` has ``(A_k [r, d_in], B_k [d_out, r])`` and the weight ``p_k``, its share of all photos. The exact mean of
the updates is ``dW = sum_k p_k B_k A_k``, of a rank up to ``K r``. The product of the mean factors is not: it has terms
``p_j p_k B_j A_k`` of two clients. Of NoRA the pair is the inner one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...adapters.deltas import functional
from .settings import Aggregation

Pair = tuple[Tensor, Tensor]
RIDGE = 0.01
"""LoRA-FAIR's weight of the correction's norm, here relative to the mean eigenvalue of ``A A^T``."""


def mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_k p_k v_k`` in fp64."""
    return torch.stack([weight * value.double() for value, weight in zip(values, weights, strict=True)]).sum(0)


def stacked(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """``([A_1; ...; A_K], [p_1 B_1, ..., p_K B_K])`` in fp64, whose product is the exact mean of the updates."""
    up = torch.cat([weight * up.double() for (_, up), weight in zip(pairs, weights, strict=True)], 1)
    return torch.cat([down.double() for down, _ in pairs]), up


def average(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """``(sum_k p_k A_k, sum_k p_k B_k)``: FedIT, the plain mean of the factors (arXiv 2305.05644)."""
    return mean([down for down, _ in pairs], weights), mean([up for _, up in pairs], weights)


def exact(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """The exact mean ``dW = U S V^T``, cut to the rank ``r`` of the clients: the nearest update of that rank.

    ``A = c V_r^T`` and ``B = U_r S_r / c``, where ``c`` is the length of the rows of the mean ``A``: a rank without an
    update keeps a row of ``A``, so that it can still be trained.
    """
    rank = len(pairs[0][0])
    u, s, v = functional.product_svd(*stacked(pairs, weights))
    length = mean([down for down, _ in pairs], weights).square().sum().div(rank).sqrt().clamp(min=1e-12)
    return length * v[:, :rank].T, u[:, :rank] * s[:rank] / length


def fair(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """LoRA-FAIR: ``(A, B + D)`` with the means ``A``, ``B`` and a correction ``D`` (arXiv 2411.14961).

    ``D`` minimizes ``||dW - (B + D) A||_F^2 + l ||D||_F^2`` with ``l = RIDGE tr(A A^T) / r``, so
    ``D = (dW - B A) A^T (A A^T + l I)^-1``. The paper minimizes a cosine distance with the same penalty by gradient
    descent; least squares has the same aim and a closed form.
    """
    down, up = average(pairs, weights)
    gram = down @ down.T
    towards = mean([b.double() @ (a.double() @ down.T) for a, b in pairs], weights) - up @ gram
    ridge = RIDGE * gram.trace() / len(gram)
    system = gram + ridge.clamp(min=1e-300) * torch.eye(len(gram), dtype=gram.dtype)
    return down, up + torch.linalg.solve(system, towards.T).T


AGGREGATIONS: dict[Aggregation, Callable[[Sequence[Pair], Sequence[float]], Pair]] = {
    "average": average,
    "exact": exact,
    "fair": fair,
}


def squared_errors(pair: Pair, pairs: Sequence[Pair], weights: Sequence[float]) -> tuple[float, float]:
    """``(||B A - dW||_F^2, ||dW||_F^2)`` for the exact mean ``dW`` of the clients' updates."""
    down, up = stacked(pairs, weights)
    both = torch.cat([down, pair[0].double()]), torch.cat([up, -pair[1].double()], 1)
    return _squared_norm(*both), _squared_norm(down, up)


def _squared_norm(down: Tensor, up: Tensor) -> float:
    """``||B A||_F^2 = tr(B^T B A A^T)``."""
    return max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0)
