"""The arithmetic that all adapters share, as plain functions on tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

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


def routed_delta(p: Tensor, gates: Tensor, up: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """``sum_i g_i * diag(b_i) B diag(a_i) p``, the mixture of ranks (MoR, arXiv 2410.13408) without its scale.

    Shapes: ``p [..., r]``, ``gates [..., N]``, ``B [d_out, r]``, ``a [N, r]`` (inner), ``b [N, d_out]`` (outer).
    The experts share ``B``: one product of ``[..., N, r]`` rows with ``B^T``, then a gated sum.
    """
    scaled = p.unsqueeze(-2) * inner.to(p.dtype)
    lifted = F.linear(scaled, up.to(p.dtype)) * outer.to(p.dtype)
    return (gates.unsqueeze(-1) * lifted).sum(-2)


def router_gates(logits: Tensor) -> Tensor:
    """Dense softmax gates over the experts, formed in fp32 for half-precision inputs."""
    return torch.softmax(logits.float(), dim=-1).to(logits.dtype)


def rowwise(p: Tensor, matrices: Tensor) -> Tensor:
    """Each row of a batch times a matrix of its own: ``p [n, ..., k]``, ``M [n, k, m]`` -> ``[n, ..., m]``."""
    return torch.bmm(p.flatten(1, -2) if p.ndim > 2 else p.unsqueeze(1), matrices).view(*p.shape[:-1], -1)
