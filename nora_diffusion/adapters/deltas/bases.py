"""Outer bases: functions ``(W, r, statistics) -> (down [r, d_in], up [d_out, r])``.

A basis chooses the subspaces of a weight ``W [d_out, d_in]`` that an adapter can change. To add one, write a function
and enter it in :data:`BASES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import UserError
from ..axes import Basis, Placement

Pair = tuple[Tensor, Tensor]

EXACT_LIMIT = 512
"""Weights whose smaller side exceeds this use a randomized SVD, whose cost grows with ``r`` only."""
OVERSAMPLING = 16
ITERATIONS = 6
DEAD_CHANNEL = 1e-3
"""Activation strengths are at least this fraction of their mean: ``1/s`` of a dead channel would be infinite."""


def truncated_svd(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top-``r`` singular triplets ``U [d_out, r]``, ``S [r]``, ``V^T [r, d_in]`` of ``W`` in fp32.

    Exact for small weights and for large ranks; otherwise by subspace iteration, whose error ``||W - U S V^T||_F`` is
    within 0.1% of the optimum for spectra that decay like those of trained weights. Signs are fixed (the largest entry
    of each right vector is positive) and the start is seeded: the same weight gives the same basis on the same machine.
    Raises :class:`UserError` for a weight that is not finite.
    """
    weight = weight.detach().float()
    if weight.device.type not in ("cpu", "cuda"):
        weight = weight.cpu()  # other devices have no SVD or QR
    if not torch.isfinite(weight).all():
        raise UserError("a weight of the base contains NaN or infinity: its files are damaged, download them again")
    smaller = min(weight.shape)
    if smaller <= EXACT_LIMIT or 2 * (r + OVERSAMPLING) >= smaller:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, vt = randomized_svd(weight, r + OVERSAMPLING)
    u, s, vt = u[:, :r], s[:r], vt[:r]
    largest = vt.gather(1, vt.abs().argmax(1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    return u * sign.T, s, vt * sign


def randomized_svd(weight: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Approximate top-``k`` triplets by subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061, alg. 4.4, 5.1).

    ``Q = orth((W W^T)^n W G)`` with a seeded normal ``G [d_in, k]``, then the exact SVD of ``Q^T W [k, d_in]``.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(weight.shape[1], k, generator=generator).to(weight.device)
    q = torch.linalg.qr(weight @ start).Q
    for _ in range(ITERATIONS):
        q = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ q).Q).Q
    u, s, vt = torch.linalg.svd(q.T @ weight, full_matrices=False)
    return q @ u, s, vt


def with_placement(u: Tensor, s: Tensor, vt: Tensor, placement: Placement) -> Pair:
    """``(A, B)``: ``up``: ``B = U S``; ``down``: ``A = S V^T``; ``sqrt``: ``sqrt(S)`` in both; ``none``: no ``S``."""
    powers = {"up": (0.0, 1.0), "down": (1.0, 0.0), "sqrt": (0.5, 0.5), "none": (0.0, 0.0)}
    down_power, up_power = powers[placement]
    return s.pow(down_power).unsqueeze(1) * vt, u * s.pow(up_power)


def svd(weight: Tensor, r: int, strength: Tensor | None, *, placement: Placement, power: float) -> Pair:
    """Plain SVD: the top ``r`` components of ``W = U S V^T``; activations are not used."""
    return with_placement(*truncated_svd(weight, r), placement)


def awsvd(weight: Tensor, r: int, strength: Tensor | None, *, placement: Placement, power: float) -> Pair:
    """Activation-aware SVD (NoRA, arXiv 2408.10280): factor ``W diag(s) = U S V^T``, then ``A = V_r^T diag(1/s)``.

    ``s = mean(|x|)^power`` per input channel, from a calibration pass; ``B A`` minimizes
    ``||(W - B A) diag(s)||_F``, the error weighted by the activation strength of each input channel.

    Raises ``ValueError`` without activation strengths ``[d_in]``.
    """
    if strength is None:
        raise ValueError("the 'awsvd' basis needs activation statistics: calibrate, or use basis='svd'")
    s = strength.detach().float()
    s = s.clamp(min=DEAD_CHANNEL * float(s.mean()) or 1.0).pow(power)
    down, up = with_placement(*truncated_svd(weight * s, r), placement)
    return down / s.to(down.device), up


def learned(weight: Tensor, r: int, strength: Tensor | None, *, placement: Placement, power: float) -> Pair:
    """A basis that was learned from the base's pseudo-subjects cannot be computed. Raises :class:`UserError`."""
    raise UserError(
        "the 'learned' basis is read from a file: make one with `nora-diffusion basis learn` and give it as basis_from"
    )


def kaiming(weight: Tensor, r: int, strength: Tensor | None, *, placement: Placement, power: float) -> Pair:
    """Random factors with Kaiming-uniform rows, like the initial ``A`` of LoRA (arXiv 2106.09685)."""
    return _random_pair(weight, r, lambda factor: torch.nn.init.kaiming_uniform_(factor, a=math.sqrt(5)))


def orthogonal(weight: Tensor, r: int, strength: Tensor | None, *, placement: Placement, power: float) -> Pair:
    """Random subspaces: ``A`` with orthonormal rows, ``B`` with orthonormal columns; a control for the SVD bases."""
    return _random_pair(weight, r, torch.nn.init.orthogonal_)


def _random_pair(weight: Tensor, r: int, fill: Callable[[Tensor], Tensor]) -> Pair:
    """A random pair in fp32, drawn on the CPU, so that one seed gives the same adapter on every device."""
    d_out, d_in = weight.shape
    down, up = (fill(torch.empty(shape, dtype=torch.float32, device="cpu")) for shape in ((r, d_in), (d_out, r)))
    return down.to(weight.device), up.to(weight.device)


def sharing(weight: Tensor, r: int, strength: Tensor | None, *, placement: Placement, power: float) -> Pair:
    """MoRA's fixed maps (arXiv 2405.12130, eq. 6): channel ``i`` belongs to group ``i mod r``.

    ``A`` sums the channels of each group, ``B`` copies each sum to the channels of its group.
    """
    d_out, d_in = weight.shape
    eye = torch.eye(r, dtype=torch.float32, device=weight.device)
    return eye[:, torch.arange(d_in, device=weight.device) % r], eye[torch.arange(d_out, device=weight.device) % r]


BASES: dict[Basis, Callable[..., Pair]] = {
    "svd": svd,
    "awsvd": awsvd,
    "learned": learned,
    "kaiming": kaiming,
    "orthogonal": orthogonal,
    "sharing": sharing,
}
