"""A frozen linear projection and one mixture in a single autograd function: the training path of ``nn.Linear``.

The same map as the frozen projection plus :meth:`.routed.RoutedDelta.forward`, with the same gradients, in fewer passes
over ``[tokens, d_out]`` and ``[tokens, d_in]``. The functions can be differentiated once, and compute in autocast's
dtype where it is on, else in that of ``x``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import functional
from .mixture import gated_rows, gated_up_backward, stacked_up

Grads = tuple[Tensor | None, ...]


def routed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, down: Tensor, router: Tensor, *up: Tensor | None
) -> Tensor:
    """``y = W x + b + s sum_i g_i U_i p_i``, ``[..., d_out]``, with ``p = D x`` and ``g = softmax(W_g x)`` per token.

    Frozen ``W [d_out, d_in]`` and ``b``; ``D [k, d_in]``; ``router``: ``W_g [N, d_in]``; ``up``: the factors of
    :func:`.mixture.gated_up`. Kept for backward: ``x`` and ``[p; W_g x]``.
    """
    apply: Any = _RoutedLinear.apply
    with functional.AutocastOff(x) as dtype:
        y: Tensor = apply(x, weight, bias, scale, dtype, down, router, *up)
    return y


class _RoutedLinear(torch.autograd.Function):
    """With ``S = [D; W_g]`` and ``ds`` the gradient of ``S x``: ``dx = W^T dy + s S^T ds`` and ``dS = s ds x^T``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        dtype: torch.dtype,
        down: Tensor,
        router: Tensor,
        up: Tensor,
        inner: Tensor | None = None,
        outer: Tensor | None = None,
    ) -> Tensor:
        flat, weight, y = functional.frozen_linear(x, weight, bias, dtype)
        rows = torch.cat([down, router]).to(flat.dtype) @ flat.T
        _, z = gated_rows(rows, len(router), shared=inner is not None)
        y.addmm_(z.T, stacked_up(up, inner, outer).to(z.dtype), alpha=scale)
        ctx.scale, ctx.x_shape, ctx.x_dtype = scale, x.shape, x.dtype
        need_x = ctx.needs_input_grad[0]
        ctx.save_for_backward(weight if need_x else None, flat, rows, down, router, up, inner, outer)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Grads:
        weight, flat, rows, down, router, *up = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])
        d_rows, d_up = gated_up_backward(dy, rows, len(router), *up)
        dx = None
        if weight is not None:
            skinny = torch.cat([down, router]).to(rows.dtype)
            dx = (dy @ weight).addmm_(d_rows.T, skinny, alpha=ctx.scale).view(ctx.x_shape).to(ctx.x_dtype)
        d_skinny = (d_rows @ flat).to(down.dtype)
        grads = [d_skinny[: len(down)], d_skinny[len(down) :], *d_up]
        return dx, None, None, None, None, *(g if g is None or ctx.scale == 1 else ctx.scale * g for g in grads)


def rowwise_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, down: Tensor, mask: Tensor, up: Tensor
) -> Tensor:
    """``y_n = W x_n + b + s (M_n o U) D x_n`` for each row ``n`` of the batch, ``x [rows, ..., d_in]``.

    Frozen ``W [d_out, d_in]`` and ``b``; ``D [k, d_in]``; ``U [d_out, k]``; ``mask``: ``M [rows or 1, d_out or 1, k]``.
    Kept for backward: ``x``, ``D x`` and ``M``.
    """
    apply: Any = _RowwiseLinear.apply
    with functional.AutocastOff(x) as dtype:
        y: Tensor = apply(x, weight, bias, scale, dtype, down, mask, up)
    return y


class _RowwiseLinear(torch.autograd.Function):
    """With ``p = D x``, ``U_n = M_n o U`` and ``h_n = U_n^T dy_n``:

    ``dx = W^T dy + s D^T h``, ``dD = s h x^T``, ``dU_n = s dy_n p_n^T``, ``dM_n = dU_n o U`` and
    ``dU = sum_n dU_n o M_n``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        dtype: torch.dtype,
        down: Tensor,
        mask: Tensor,
        up: Tensor,
    ) -> Tensor:
        flat, weight, y = functional.frozen_linear(x, weight, bias, dtype)
        p = torch.mm(flat, down.to(dtype).t()).unflatten(0, (len(mask), -1))
        ups = (mask * up).to(dtype)
        y.view(len(mask), -1, y.shape[-1]).baddbmm_(p, ups.transpose(1, 2), alpha=scale)
        ctx.scale, ctx.x_shape, ctx.x_dtype = scale, x.shape, x.dtype
        need_x, need_down = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        ctx.save_for_backward(weight if need_x else None, flat if need_down else None, p, down, mask, up)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Grads:
        weight, flat, p, down, mask, up = ctx.saved_tensors
        dy = dy.reshape(len(mask), -1, dy.shape[-1])
        h = torch.bmm(dy, (mask * up).to(dy.dtype)).flatten(0, 1)
        d_ups = functional.at_least_single(torch.bmm(dy.transpose(1, 2), p))
        d_ups = d_ups if ctx.scale == 1 else ctx.scale * d_ups
        d_up = (d_ups * mask).sum(0).to(up.dtype)
        d_mask = (d_ups * up).sum_to_size(mask.shape).to(mask.dtype)
        dx = d_down = None
        if flat is not None:
            d_down = ctx.scale * torch.mm(h.t(), flat).to(down.dtype)
        if weight is not None:
            dx = torch.mm(dy.flatten(0, 1), weight)
            dx = dx.addmm_(h, down.to(h.dtype), alpha=ctx.scale).view(ctx.x_shape).to(ctx.x_dtype)
        return dx, None, None, None, None, d_down, d_mask, d_up
