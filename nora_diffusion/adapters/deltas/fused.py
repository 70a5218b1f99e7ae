"""A frozen linear projection and one chain in a single autograd function: the training path of ``nn.Linear``.

The same map as the frozen projection plus :meth:`.chain.ChainDelta.forward`, with the same gradients. A step is faster
because it makes fewer passes over ``[tokens, d_out]`` and ``[tokens, d_in]``, and smaller because a chain with a frozen
``A_out`` keeps only ``p = A_out x [tokens, r]`` for backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import functional


def chained_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, below: Sequence[Tensor], above: Sequence[Tensor], scale: float
) -> Tensor:
    """``y = W x + b + s U C D x``, ``[..., d_out]``, for a frozen ``W [d_out, d_in]`` and ``b``.

    ``below``: ``[D [r, d_in]]`` or ``[D, L [k, r]]``; ``above``: ``[U [d_out, k]]`` or ``[M [r, k], U [d_out, r]]``;
    the core is ``C = M L``, ``L`` or the identity. Gradients reach ``x`` and the factors that require them, once.
    Computed in autocast's dtype where it is on, else in that of ``x``; ``C`` and its gradients at least in fp32.
    """
    lower = below[1] if len(below) > 1 else None
    upper = above[0] if len(above) > 1 else None
    apply: Any = _ChainedLinear.apply
    y: Tensor = apply(x, weight, bias, below[0], lower, upper, above[-1], scale)
    return y


class _ChainedLinear(torch.autograd.Function):
    """With ``p = D x``, ``u = C p``, ``h = U^T dy`` and ``v = C^T h``:

    ``dx = W^T dy + s D^T v``, ``dC = s h p^T``, ``dD = s v x^T`` and ``dU = s dy u^T``.
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
    ) -> Tensor:
        flat, weight, y = functional.frozen_linear(x, weight, bias)
        dtype, core = flat.dtype, _core(lower, upper)
        p = F.linear(flat, _cast(down, dtype))
        u = p if core is None else F.linear(p, core.to(dtype))
        y.addmm_(u, _cast(up, dtype).T, alpha=scale)
        ctx.scale, ctx.x_shape, ctx.x_dtype = scale, x.shape, x.dtype
        need_x, need_down = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        ctx.save_for_backward(weight if need_x else None, flat if need_down else None, p, down, lower, upper, up)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, x, p, down, lower, upper, up = ctx.saved_tensors
        need_x, _, _, need_down, need_lower, need_upper, need_up, _ = ctx.needs_input_grad
        dtype, scale = p.dtype, ctx.scale
        dy = dy.reshape(-1, dy.shape[-1])
        core = _core(lower, upper)
        low_core = None if core is None else core.to(dtype)
        dx = d_down = d_lower = d_upper = d_up = None
        if need_up:
            d_up = _scaled(dy.T @ (p if low_core is None else F.linear(p, low_core)), up, scale)
        h = dy @ _cast(up, dtype)
        v = h if low_core is None else h @ low_core
        if core is not None and (need_lower or need_upper):
            d_core = _scaled(h.T @ p, core, scale)
            d_lower = (d_core if upper is None else upper.to(d_core.dtype).T @ d_core).to(lower.dtype)
            d_upper = None if upper is None else (d_core @ lower.to(d_core.dtype).T).to(upper.dtype)
        if need_down:
            d_down = _scaled(v.T @ x, down, scale)
        if need_x:
            dx = (dy @ weight).addmm_(v, _cast(down, dtype), alpha=scale).view(ctx.x_shape).to(ctx.x_dtype)
        return dx, None, None, d_down, d_lower, d_upper, d_up, None


def _core(lower: Tensor | None, upper: Tensor | None) -> Tensor | None:
    return None if lower is None else functional.core_product(lower, upper)


def _cast(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Through fp32 on a CPU, where PyTorch converts fp16 to bf16 one number at a time."""
    if factor.device.type == "cpu" and factor.dtype != dtype:
        factor = factor.to(torch.promote_types(torch.float32, dtype))
    return factor.to(dtype)


def _scaled(grad: Tensor, like: Tensor, scale: float) -> Tensor:
    grad = grad.to(like.dtype)
    return grad if scale == 1 else grad * scale
