"""A frozen linear projection and one chain in a single autograd function: the training path of ``nn.Linear``.

The same map as the frozen projection plus :meth:`.chain.ChainDelta.forward`, with the same gradients. A step is faster
because it makes fewer passes over ``[tokens, d_out]`` and ``[tokens, d_in]``, and smaller because a chain with a frozen
``A_out`` keeps only ``p = A_out x [tokens, r]`` and, for a nested core, ``A_in p [tokens, r']`` for backward.
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
    """With ``p = D x``, ``q = L p``, ``V = U M`` and in backward ``h = U^T dy``, ``k = M^T h``, ``K = L D``:

    ``y = W x + b + s V q``, ``dx = W^T dy + s K^T k``, ``dD = s (L^T k) x^T``, ``dL = s k p^T``, ``dM = s h q^T`` and
    ``dU = s dy (M q)^T``. So ``[tokens, d_out]`` and ``[tokens, d_in]`` are updated from the narrowest rank.
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
        q = p if lower is None else _product(p, lower.t(), dtype)
        wide = copies.get("up", up, dtype) if upper is None else _product(up, upper, dtype)
        y.addmm_(q, wide.t(), alpha=scale)
        need_x, _, _, need_down, _, _, need_up, *_ = ctx.needs_input_grad
        outside = weight if need_x else None, flat if need_down else None
        inside = None if lower is None else p, None if upper is None and not need_up else q
        ctx.save_for_backward(*outside, *inside, down, lower, upper, up)
        ctx.rest = scale, copies, dtype, x.shape, x.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, x, p, q, down, lower, upper, up = ctx.saved_tensors
        scale, copies, dtype, x_shape, x_dtype = ctx.rest
        need_x, _, _, need_down, _, _, need_up, *_ = ctx.needs_input_grad
        dy = dy.reshape(-1, dy.shape[-1])
        dx = d_down = d_lower = d_upper = d_up = None
        if need_up:
            u = q if upper is None else _product(q, upper.t(), dtype)
            d_up = _scaled(torch.mm(dy.t(), u), up, scale)
        k = torch.mm(dy, copies.get("up", up, dtype))
        if lower is not None:
            k, d_lower, d_upper = _core_backward(k, p, q, lower, upper, scale)
        if need_down:
            v = k if lower is None else _product(k, lower, dtype)
            d_down = _scaled(torch.mm(v.t(), x), down, scale)
        if need_x:
            narrow = copies.get("down", down, dtype) if lower is None else _product(lower, down, dtype)
            dx = torch.mm(dy, weight).addmm_(k.to(dtype), narrow, alpha=scale)
            dx = dx.view(x_shape).to(x_dtype)
        return dx, None, None, d_down, d_lower, d_upper, d_up, None, None, None


def _core_backward(
    h: Tensor, p: Tensor, q: Tensor | None, lower: Tensor, upper: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``k``, ``dL`` and ``dM``, at least in fp32."""
    k, d_upper = functional.at_least_single(h), None
    if upper is not None:
        assert q is not None
        d_upper = _scaled(torch.mm(k.t(), functional.at_least_single(q)), upper, scale)
        k = torch.mm(k, upper.to(k.dtype))
    return k, _scaled(torch.mm(k.t(), functional.at_least_single(p)), lower, scale), d_upper


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left right``. Casting a low-rank factor costs less than a small product in half precision takes to start."""
    return torch.mm(functional.at_least_single(left), functional.at_least_single(right)).to(dtype)


def _scaled(grad: Tensor, like: Tensor, scale: float) -> Tensor:
    grad = grad.to(like.dtype)
    return grad if scale == 1 else grad * scale
