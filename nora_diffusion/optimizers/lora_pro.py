"""LoRA-Pro: steps of a low-rank pair that are nearest to a step of the full weight."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .matrices import eigh
from .paired import Group, PairedOptimizer, Params, Stack

Moments = Literal["factors", "full"]
DAMPING: dict[Moments, float] = {"factors": 1.0, "full": 1e-2}
"""The ridge that learned best on the embedded base."""


class LoRAPro(PairedOptimizer):
    """LoRA-Pro: ``(B, A) - lr Adam(argmin_{Y,Z} norm(s (Y A + B Z) - dL/dW))``.

    A change ``(Y, Z)`` of ``(B, A)`` changes ``dW = s B A`` by ``s (Y A + B Z)`` to first order. :func:`corrected`
    finds the one that is nearest to the full gradient ``g = dL/dW``, from the gradients of the factors alone.

    ``moments="full"`` (default): the paper's algorithm. Adam's moments are those of ``s (Y A + B Z) [d_out, d_in]``,
    which take the memory of full fine-tuning; the normalized matrix stands for ``g`` in a second correction, whose
    result is the step. Its learning rate is one of ``dW``, lower than that of factors. ``"factors"``: Adam of ``Y`` and
    ``Z``, in AdamW's memory. Its second moment remembers the long first steps of ``A``, after which ``A`` hardly moves,
    unless the ridge bounds them.

    ``damping``: ridge of the least squares, relative to the mean eigenvalue of ``B^T B`` and ``A A^T``; 0.01 for
    ``full`` and 1 for ``factors`` by default. The first step, at ``B = 0``, has ``Z = 0`` and
    ``Y = gB (A A^T + ridge)^-1 / s^2``: ``B`` moves, ``A`` does not. All else as in :class:`PairedOptimizer`.

    Raises ``ValueError`` for factors that are no pair, and for options out of range.

    Paper: https://arxiv.org/abs/2407.18242
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        lr_ratio: float = 1.0,
        damping: float | None = None,
        moments: Moments = "full",
    ) -> None:
        if moments not in DAMPING:
            raise ValueError(f"moments={moments!r} is unknown: choose 'factors' or 'full'")
        damping = DAMPING[moments] if damping is None else damping
        if not damping >= 0:
            raise ValueError(f"damping={damping} must be at least 0")
        own: dict[str, Any] = {"lr_ratio": lr_ratio, "damping": damping, "moments": moments}
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **own)

    def _step_pairs(self, stack: Stack, group: Group, step: int) -> None:
        down, up = stack.matrices(stack.downs), stack.matrices(stack.ups)
        gradients = stack.gradients(stack.downs), stack.gradients(stack.ups)
        z, y = corrected(down, up, *gradients, stack.scales, group["damping"])
        rates = group["lr"], group["lr"] * group["lr_ratio"]
        if group["moments"] == "full":
            z, y = self._full(stack, group, step, (down, up), (z, y))
            for value, change, rate in zip((down, up), (z, y), rates, strict=True):
                value.mul_(1 - rate * group["weight_decay"]).add_(change, alpha=-rate)
        else:
            for owners, value, change, rate in zip((stack.downs, stack.ups), (down, up), (z, y), rates, strict=True):
                moments = [self._factor_state(stack, owners, name) for name in ("exp_avg", "exp_avg_sq")]
                adam(value, change, moments, group, step, rate, group["weight_decay"])
        stack.write(stack.downs, down)
        stack.write(stack.ups, up)

    def _full(
        self, stack: Stack, group: Group, step: int, factors: tuple[Tensor, Tensor], changes: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The correction of Adam's normalized full gradient."""
        (down, up), (z, y), s = factors, changes, stack.scales
        gradient = torch.cat([s * y, s * up], 2) @ torch.cat([down, z], 1)
        shape = (stack.blocks, *gradient.shape[1:])
        moments = [self._state(stack, stack.ups, name, shape).flatten(0, 1) for name in ("full_avg", "full_avg_sq")]
        full = torch.zeros_like(gradient)
        adam(full, gradient, moments, group, step, -1.0)
        return corrected(down, up, (s * up).mT @ full, full @ (s * down).mT, s, group["damping"])


def corrected(
    down: Tensor, up: Tensor, g_down: Tensor, g_up: Tensor, scale: Tensor | float, damping: float
) -> tuple[Tensor, Tensor]:
    """``(Z, Y)`` that minimize ``|s (Y A + B Z) - g|^2 + s^2 t (|Y|^2 + |Z|^2)``, given ``s B^T g`` and ``s g A^T``.

    ``A [n, r, d_in]``, ``B [n, d_out, r]``, ``gA = s B^T g`` and ``gB = s g A^T`` their gradients. With ``P = B^T B``,
    ``Q = A A^T`` and the ridge ``t = damping tr(P + Q) / 2r`` the normal equations give ``N = Z A^T = B^T Y`` from a
    Sylvester equation, and with it both changes::

        P N + N Q + t N = gA A^T / s^2
        Z = (P + t)^-1 (gA / s^2 - N A)
        Y = (gB / s^2 - B N) (Q + t)^-1

    For ``t -> 0`` this is the paper's closed form, with its choice of ``X``, which is the solution of least norm; in
    this form it also holds where ``P`` or ``Q`` is singular.
    """
    (p, u), (q, v) = eigh(up.mT @ up, down @ down.mT)
    ridge = damping * (p.sum(-1) + q.sum(-1)) / (2 * p.shape[-1]) + torch.finfo(p.dtype).tiny
    ridge = ridge[:, None]
    g_down, g_up = g_down / scale**2, g_up / scale**2
    right = u.mT @ (g_down @ down.mT) @ v
    n = u @ (right / (p[:, :, None] + q[:, None, :] + ridge[:, None])) @ v.mT
    z = (u / (p + ridge)[:, None, :]) @ (u.mT @ torch.baddbmm(g_down, n, down, alpha=-1))
    y = torch.baddbmm(g_up, up, n, alpha=-1) @ ((v / (q + ridge)[:, None, :]) @ v.mT)
    return z, y


def adam(
    value: Tensor,
    gradient: Tensor,
    moments: list[Tensor],
    group: Group,
    step: int,
    rate: float,
    weight_decay: float = 0.0,
) -> None:
    """AdamW's step ``step`` of ``value``, in place, in one pass over memory where torch can."""
    fused = value.device.type in ("cpu", "cuda")
    adamw(
        [value], [gradient], moments[:1], moments[1:], [], [torch.tensor(step - 1.0, device=value.device)], fused=fused,
        foreach=not fused, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=rate,
        weight_decay=weight_decay, eps=group["eps"], maximize=False,
    )  # fmt: skip
