"""The gated sum of a mixture's experts per token, with its backward pass written out.

Autograd would keep the gated rows ``[tokens, N r]`` and the products that make them. Here only ``[p; l]`` is kept, the
low-rank image of a token with the logits of its gates, and backward computes the rows again. Tokens come last in these
arrays, since a softmax or a sum over 8 experts is slow in memory order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def gated_up(
    s: Tensor, num_experts: int, up: Tensor, inner: Tensor | None = None, outer: Tensor | None = None
) -> Tensor:
    """``dy = sum_i g_i U_i p_i``, ``[..., d_out]``, with ``g = softmax(l)`` for ``s = [p; l] [..., k + N]``.

    ``p_i`` and ``U_i`` are the ``N`` parts of ``p`` and ``up [d_out, k]``, ``k = N r``. With scalings ``a [N, r]``
    (inner) and ``b [N, d_out]`` (outer) all experts share both, ``k = r``, and ``U_i = diag(b_i) up diag(a_i)``. The
    gates are computed at least in fp32. It can be differentiated once.
    """
    rows = s.reshape(-1, s.shape[-1])
    dy: Tensor = _GatedUp.apply(rows, num_experts, up, inner, outer)  # type: ignore[no-untyped-call]
    return dy.view(*s.shape[:-1], up.shape[0])


class _GatedUp(torch.autograd.Function):
    """``dy = z^T L`` with the gated rows ``z_i = g_i p_i`` and the experts' factors ``L_i = U_i^T``."""

    @staticmethod
    def forward(
        ctx: Any, s: Tensor, num_experts: int, up: Tensor, inner: Tensor | None, outer: Tensor | None
    ) -> Tensor:
        rows = s.T.contiguous()
        ctx.num_experts = num_experts
        ctx.save_for_backward(rows, up, inner, outer)
        _, z = gated_rows(rows, num_experts, shared=inner is not None)
        return z.T @ stacked_up(up, inner, outer).to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, *factors = ctx.saved_tensors
        d_rows, d_factors = gated_up_backward(dy.to(rows.dtype), rows, ctx.num_experts, *factors)
        return d_rows.T, None, *d_factors


def gated_rows(rows: Tensor, num_experts: int, *, shared: bool) -> tuple[Tensor, Tensor]:
    """``g [N, tokens]``, at least in fp32, and ``z [N r, tokens]`` for ``[p; l] [k + N, tokens]``."""
    p, logits = rows[:-num_experts], rows[-num_experts:]
    gates = torch.softmax(logits, 0, dtype=torch.promote_types(rows.dtype, torch.float32))
    experts = p if shared else p.unflatten(0, (num_experts, -1))
    return gates, (gates.to(rows.dtype).unsqueeze(1) * experts).flatten(0, 1)


def stacked_up(up: Tensor, inner: Tensor | None, outer: Tensor | None) -> Tensor:
    """``L [N r, d_out]``."""
    if inner is None or outer is None:
        return up.T
    return (inner.unsqueeze(-1) * outer.unsqueeze(1)).mul_(up.T.contiguous()).flatten(0, 1)


def gated_up_backward(
    dy: Tensor, rows: Tensor, num_experts: int, up: Tensor, inner: Tensor | None, outer: Tensor | None
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The gradients of ``[p; l]`` and of ``(up, inner, outer)`` for ``dy [tokens, d_out]``.

    ``dz = L dy^T``, ``dL = z dy`` and ``dp_i = g_i dz_i``; with ``h_i = z_i . dz_i`` the softmax has
    ``dl_i = h_i - g_i sum_j h_j``.
    """
    gates, z = gated_rows(rows, num_experts, shared=inner is not None)
    dz = stacked_up(up, inner, outer).to(z.dtype) @ dy.T
    d_factors = stacked_up_backward(z @ dy, up, inner, outer)
    z, dz = (value.unflatten(0, (num_experts, -1)) for value in (z, dz))
    h = z.mul_(dz).sum(1).to(gates.dtype)
    dl = torch.addcmul(h, gates, h.sum(0), value=-1).to(rows.dtype)
    dz.mul_(gates.to(rows.dtype).unsqueeze(1))
    return torch.cat([dz.flatten(0, 1) if inner is None else dz.sum(0), dl]), d_factors


def stacked_up_backward(
    d_stacked: Tensor, up: Tensor, inner: Tensor | None, outer: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of ``up``, ``inner`` and ``outer`` for ``dL [N r, d_out]``.

    ``dup^T = sum_i a_i b_i^T o dL_i``, and with ``E_i = dL_i o up^T``: ``da_i = E_i b_i`` and ``db_i = E_i^T a_i``.
    """
    if inner is None or outer is None:
        return d_stacked.T.to(up.dtype), None, None
    d_stacked = d_stacked.to(up.dtype).view(*inner.shape, -1)
    d_up = (inner.unsqueeze(-1) * outer.unsqueeze(1)).mul_(d_stacked).sum(0).T
    e = d_stacked * up.T.contiguous()
    return d_up, torch.bmm(e, outer.unsqueeze(-1)).squeeze(-1), torch.bmm(inner.unsqueeze(1), e).squeeze(1)
