"""The arithmetic that all adapters share, as plain functions on tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

Contract = Callable[[Tensor, Tensor], Tensor]
"""``(x, A [k, d_in]) -> p [..., k]``: applies a down-projection and leaves its channels last."""


def contract_linear(x: Tensor, down: Tensor) -> Tensor:
    """``p = x A^T`` for ``x [..., d_in]`` and ``A [k, d_in]``."""
    return F.linear(x, down.to(x.dtype))


def contract_conv(
    x: Tensor,
    down: Tensor,
    *,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
) -> Tensor:
    """``p = conv(x, A)`` for ``x [n, c, h, w]`` and ``A [k, c * kh * kw]``, returned as ``[n, h', w', k]``.

    A convolution is a linear map of unfolded patches, so a low-rank pair of its unfolded weight is a small
    convolution followed by a 1x1 one.
    """
    weight = down.to(x.dtype).view(down.shape[0], x.shape[1], *kernel_size)
    return F.conv2d(x, weight, stride=stride, padding=padding, dilation=dilation).movedim(1, -1)


def collapse(factors: Sequence[Tensor]) -> Tensor:
    """The product of a chain's factors, the first applied first: ``[A_out, A_in] -> A_in A_out``."""
    dtype = functools.reduce(torch.promote_types, (factor.dtype for factor in factors))
    product = factors[0].to(dtype)
    for factor in factors[1:]:
        product = factor.to(dtype) @ product
    return product


def product_svd(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``U [d_out, n]``, ``S [n]``, ``V [d_in, n]`` of ``B A = U diag(S) V^T`` without forming it, ``n <= k``.

    With ``B = Q_B R_B`` and ``A^T = Q_A R_A`` the singular values of ``B A`` are those of the small ``R_B R_A^T``.
    """
    up_basis, up_rest = torch.linalg.qr(up)
    down_basis, down_rest = torch.linalg.qr(down.T)
    u, s, vt = torch.linalg.svd(up_rest @ down_rest.T, full_matrices=False)
    return up_basis @ u, s, down_basis @ vt.T


def routed_delta(p: Tensor, gates: Tensor, up: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """``sum_i g_i * diag(b_i) B diag(a_i) p``, the mixture of ranks (MoR, arXiv 2410.13408) without its scale.

    Shapes: ``p [..., r]``, ``gates [..., N]``, ``B [d_out, r]``, ``a [N, r]`` (inner), ``b [N, d_out]`` (outer).
    One product of gated ``[..., N r]`` rows with ``[diag(b_1) B, ..., diag(b_N) B]``: per token autograd keeps ``N r``
    numbers for it, where a sum of lifted rows would have it keep ``N d_out``.
    """
    gated = gates.unsqueeze(-1) * p.unsqueeze(-2) * inner.to(p.dtype)
    lift = outer.T.unsqueeze(-1) * up.unsqueeze(1)
    return F.linear(gated.flatten(-2).to(p.dtype), lift.flatten(1).to(p.dtype))


def router_gates(logits: Tensor) -> Tensor:
    """Dense softmax gates over the experts, formed at least in fp32."""
    return torch.softmax(at_least_single(logits), dim=-1).to(logits.dtype)


def at_least_single(value: Tensor) -> Tensor:
    """fp8, fp16 and bf16 numbers as fp32, fp64 ones as they are."""
    return value if value.dtype == torch.float64 else value.float()


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Switches off a caller's autocast, for sums of which half precision would leave two digits."""
    if device.type == "meta":  # which knows no autocast
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def rowwise(p: Tensor, matrices: Tensor) -> Tensor:
    """Each row of a batch times a matrix of its own: ``p [n, ..., k]``, ``M [n, k, m]`` -> ``[n, ..., m]``."""
    return torch.bmm(p.flatten(1, -2) if p.ndim > 2 else p.unsqueeze(1), matrices).view(*p.shape[:-1], -1)
