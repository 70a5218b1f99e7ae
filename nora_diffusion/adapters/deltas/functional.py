"""Functions on tensors that several kinds of adapters use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Item = TypeVar("Item")
Contract = Callable[[Tensor, Tensor], Tensor]
"""``(x, A [k, d_in]) -> p [..., k]``: applies a down-projection, with channels last."""


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

    A convolution is a linear map of unfolded patches, so a low-rank pair of its unfolded weight is a convolution with
    ``k`` output channels followed by a 1x1 convolution.
    """
    weight = down.to(x.dtype).view(down.shape[0], x.shape[1], *kernel_size)
    return F.conv2d(x, weight, stride=stride, padding=padding, dilation=dilation).movedim(1, -1)


def collapse(factors: Sequence[Tensor]) -> Tensor:
    """The product of factors in the order in which they are applied: ``[A_out, A_in] -> A_in A_out``."""
    dtype = functools.reduce(torch.promote_types, (factor.dtype for factor in factors))
    product = factors[0].to(dtype)
    for factor in factors[1:]:
        product = factor.to(dtype) @ product
    return product


def groups(items: Sequence[Item], alike: Callable[[Item, Item], bool]) -> list[list[Item]]:
    """The items in groups: each joins the first group whose first item is like it."""
    found: list[list[Item]] = []
    for item in items:
        group = next((group for group in found if alike(group[0], item)), None)
        if group is None:
            found.append([item])
        else:
            group.append(item)
    return found


def product_svd(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``U [d_out, n]``, ``S [n]``, ``V [d_in, n]`` of ``B A = U diag(S) V^T``, ``n <= k``, without the dense product.

    With ``B = Q_B R_B`` and ``A^T = Q_A R_A`` the singular values of ``B A`` are those of the small ``R_B R_A^T``.
    """
    up_q, up_r = torch.linalg.qr(up)
    down_q, down_r = torch.linalg.qr(down.T)
    u, s, vt = torch.linalg.svd(up_r @ down_r.T, full_matrices=False)
    return up_q @ u, s, down_q @ vt.T


def router_gates(logits: Tensor) -> Tensor:
    """Softmax gates over all experts, computed at least in fp32."""
    return torch.softmax(at_least_single(logits), dim=-1).to(logits.dtype)


def top_gates(gates: Tensor, k: int) -> Tensor:
    """The ``k`` largest gates of each row of ``[..., N]``, and 0 for the others; all for ``k = 0``."""
    if not 0 < k < gates.shape[-1]:
        return gates
    return gates * torch.zeros_like(gates).scatter_(-1, gates.topk(k, dim=-1).indices, 1.0)


def at_least_single(value: Tensor) -> Tensor:
    """The tensor in fp32, or unchanged if it is fp64."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


class AutocastOff:
    """Disables a caller's autocast by its switch alone, which takes a tenth of the time of ``torch.autocast``.

    ``with AutocastOff(x) as dtype``: the dtype in which a linear layer would compute with ``x``, autocast's where it is
    on (never for fp64), else that of ``x``. For functions of autograd, which ``torch.compile`` does not trace.
    """

    def __init__(self, x: Tensor) -> None:
        self.dtype, self.device = x.dtype, ""
        device = x.device.type
        if device != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device):  # no autocast on meta
            self.dtype, self.device = torch.get_autocast_dtype(device), device

    def __enter__(self) -> torch.dtype:
        if self.device:
            torch.set_autocast_enabled(self.device, False)
        return self.dtype

    def __exit__(self, *_: object) -> None:
        if self.device:
            torch.set_autocast_enabled(self.device, True)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes: autocast's where it is on (never for fp64), else that of ``x``."""
    return AutocastOff(x).dtype


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Disable a caller's autocast, for sums that need more than the precision of fp16 or bf16."""
    if device.type == "meta":  # no autocast there
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """``x [tokens, d_in]`` and ``W`` in the dtype of the pass, and ``W x + b``."""
    flat, weight = x.reshape(-1, x.shape[-1]).to(dtype), weight.to(dtype)
    return flat, weight, F.linear(flat, weight, None if bias is None else bias.to(dtype))


def core_product(lower: Tensor, upper: Tensor | None) -> Tensor:
    """The core ``C = M L [k, r]`` of a chain, at least in fp32, from what a core's ``pair()`` returns."""
    lower = at_least_single(lower)
    if upper is None:
        return lower
    with without_autocast(lower.device):
        return at_least_single(upper) @ lower


def rowwise(p: Tensor, matrices: Tensor) -> Tensor:
    """Multiply each row of a batch by its matrix: ``p [n, ..., k]``, ``M [b, k, m]`` -> ``[n, ..., m]``.

    The batch has ``b`` blocks of ``n / b`` rows; those of a block share a matrix.
    """
    return torch.bmm(_in_blocks(p, len(matrices)), matrices).view(*p.shape[:-1], -1)


def add_product(y: Tensor, p: Tensor, up: Tensor, *, in_place: bool) -> Tensor:
    """``y + p B^T`` in one pass, for ``y [..., d_out]``, ``p [..., K]`` and ``B [d_out, K]``."""
    rows, update = y.reshape(-1, y.shape[-1]), p.reshape(-1, p.shape[-1])
    if not in_place:
        return torch.addmm(rows, update, up.T).view(y.shape)
    rows.addmm_(update, up.T)
    return y


def add_rowwise(y: Tensor, p: Tensor, matrices: Tensor, *, in_place: bool) -> Tensor:
    """``y + rowwise(p, M)`` in one pass, for ``y [n, ..., m]``; ``in_place``: may write into ``y``."""
    rows, update = _in_blocks(y, len(matrices)), _in_blocks(p, len(matrices))
    out = rows.baddbmm_(update, matrices) if in_place else torch.baddbmm(rows, update, matrices)
    return out.view(y.shape).to(y.dtype)


def _in_blocks(x: Tensor, count: int) -> Tensor:
    """``[n, ..., k]`` as ``[count, tokens, k]``."""
    return x.reshape(count, -1, x.shape[-1])
