"""A frozen linear projection and one chain in a single autograd function: the training path of ``nn.Linear``.

The same map as the frozen projection plus :meth:`.chain.ChainDelta.forward`, with the same gradients. A step is faster
because it makes fewer passes over ``[tokens, d_out]`` and ``[tokens, d_in]``, and smaller because a chain with a frozen
``A_out`` keeps only ``p = A_out x [tokens, r]`` for backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import functional
from .working import WorkingCopies


def chained_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    below: Sequence[Tensor],
    above: Sequence[Tensor],
    scale: float,
    copies: WorkingCopies,
) -> Tensor:
    """``y = W x + b + s U C D x``, ``[..., d_out]``, for a frozen ``W [d_out, d_in]`` and ``b``.

    ``below``: ``[D [r, d_in]]`` or ``[D, L [k, r]]``; ``above``: ``[U [d_out, k]]`` or ``[M [r, k], U [d_out, r]]``;
    the core is ``C = M L``, ``L`` or the identity. ``copies`` of frozen ``D`` and ``U`` are kept there. Gradients reach
    ``x`` and the factors that require them, once. Computed in autocast's dtype where it is on, else in that of ``x``;
    the core and its gradients at least in fp32.
    """
    lower = below[1] if len(below) > 1 else None
    upper = above[0] if len(above) > 1 else None
    apply: Any = _ChainedLinear.apply
    with functional.AutocastOff(x) as dtype:
        y: Tensor = apply(x, weight, bias, below[0], lower, upper, above[-1], scale, dtype, copies)
    return y


class _ChainedLinear(torch.autograd.Function):
    """With ``p = D x``, ``q = L p``, ``u = M q``, ``h = U^T dy``, ``k = M^T h`` and ``v = L^T k``:

    ``dx = W^T dy + s D^T v``, ``dD = s v x^T``, ``dL = s k p^T``, ``dM = s h q^T`` and ``dU = s dy u^T``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        lower: Tensor | None,
        upper: Tensor | None,
        up: Tensor,
        scale: float,
        dtype: torch.dtype,
        copies: WorkingCopies,
    ) -> Tensor:
        flat, weight, y = functional.frozen_linear(x, weight, bias, dtype)
        p = torch.mm(flat, copies.get("down", down, dtype).t())
        u = p if lower is None else _through_core(p, lower, upper)
        y.addmm_(u, copies.get("up", up, dtype).t(), alpha=scale)
        need_x, _, _, need_down, *_ = ctx.needs_input_grad
        ctx.save_for_backward(weight if need_x else None, flat if need_down else None, p, down, lower, upper, up)
        ctx.rest = scale, copies, x.shape, x.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, x, p, down, lower, upper, up = ctx.saved_tensors
        scale, copies, x_shape, x_dtype = ctx.rest
        need_x, _, _, need_down, _, _, need_up, *_ = ctx.needs_input_grad
        dtype = p.dtype
        dy = dy.reshape(-1, dy.shape[-1])
        dx = d_down = d_lower = d_upper = d_up = None
        if need_up:
            u = p if lower is None else _through_core(p, lower, upper)
            d_up = _scaled(torch.mm(dy.t(), u), up, scale)
        v = torch.mm(dy, copies.get("up", up, dtype))
        if lower is not None:
            v, d_lower, d_upper = _core_backward(v, p, lower, upper, scale)
        if need_down:
            d_down = _scaled(torch.mm(v.t(), x), down, scale)
        if need_x:
            dx = torch.mm(dy, weight).addmm_(v, copies.get("down", down, dtype), alpha=scale)
            dx = dx.view(x_shape).to(x_dtype)
        return dx, None, None, d_down, d_lower, d_upper, d_up, None, None, None


def _through_core(p: Tensor, lower: Tensor, upper: Tensor | None) -> Tensor:
    """``u = M L p``. Casting ``[tokens, r]`` costs less than what a small product in half precision takes to start."""
    u = functional.at_least_single(p)
    for factor in (lower, upper):
        if factor is not None:
            u = torch.mm(u, factor.to(u.dtype).t())
    return u.to(p.dtype)


def _core_backward(
    h: Tensor, p: Tensor, lower: Tensor, upper: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``v``, ``dL`` and ``dM``."""
    k, wide, d_upper = functional.at_least_single(h), functional.at_least_single(p), None
    low = lower.to(k.dtype)
    if upper is not None:
        d_upper = _scaled(torch.mm(k.t(), torch.mm(wide, low.t())), upper, scale)
        k = torch.mm(k, upper.to(k.dtype))
    return torch.mm(k, low).to(h.dtype), _scaled(torch.mm(k.t(), wide), lower, scale), d_upper


def _scaled(grad: Tensor, like: Tensor, scale: float) -> Tensor:
    grad = grad.to(like.dtype)
    return grad if scale == 1 else grad * scale
