"""LoRA-Pro: steps of a low-rank pair that are nearest to a step of the full weight."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .matrices import eigh
from .paired import Group, PairedOptimizer, Params, Stack

Moments = Literal["factors", "full"]


class LoRAPro(PairedOptimizer):
    """LoRA-Pro: ``(B, A) - lr Adam(argmin_{Y,Z} norm(s (Y A + B Z) - dL/dW))``.

    A change ``(Y, Z)`` of ``(B, A)`` changes ``dW = s B A`` by ``s (Y A + B Z)`` to first order. :func:`corrected`
    finds the one that is nearest to the full gradient ``g = dL/dW``, from the gradients of the factors alone.

    ``moments="factors"`` (default): Adam of ``Y`` and ``Z``, in the memory of AdamW. ``"full"``: the paper's algorithm.
    Adam's moments are those of ``s (Y A + B Z) [d_out, d_in]``, which take the memory of full fine-tuning; the
    normalized matrix stands for ``g`` in a second correction, whose result is the step.

    ``damping``: ridge of the least squares, relative to the mean eigenvalue of ``B^T B`` and ``A A^T``. It bounds the
    steps of ``A`` while ``B`` is small. The first step, at ``B = 0``, has ``Z = 0`` and
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
        damping: float = 1e-2,
        moments: Moments = "factors",
    ) -> None:
        if not damping >= 0:
            raise ValueError(f"damping={damping} must be at least 0")
        if moments not in ("factors", "full"):
            raise ValueError(f"moments={moments!r} is unknown: choose 'factors' or 'full'")
        own: dict[str, Any] = {"lr_ratio": lr_ratio, "damping": damping, "moments": moments}
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **own)

    def _step_pairs(self, stack: Stack, group: Group, step: int) -> None:
        down, up = stack.matrices(stack.downs), stack.matrices(stack.ups)
        grads = stack.gradients(stack.downs), stack.gradients(stack.ups)
        z, y = corrected(down, up, *grads, stack.scales, group["damping"])
        if group["moments"] == "full":
            z, y = self._full(stack, group, step, (down, up), (z, y))
        else:
            z, y = (
                normalized(
                    change, self._factor_state(stack, owners, "exp_avg"),
                    self._factor_state(stack, owners, "exp_avg_sq"), group, step,
                )
                for owners, change in ((stack.downs, z), (stack.ups, y))
            )  # fmt: skip
        for owners, value, change, rate in (
            (stack.downs, down, z, group["lr"]),
            (stack.ups, up, y, group["lr"] * group["lr_ratio"]),
        ):
            value.mul_(1 - rate * group["weight_decay"]).add_(change, alpha=-rate)
            stack.write(owners, value)

    def _full(
        self, stack: Stack, group: Group, step: int, factors: tuple[Tensor, Tensor], changes: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The correction of Adam's normalized full gradient."""
        (down, up), (z, y), s = factors, changes, stack.scales
        gradient = s * (y @ down + up @ z)
        shape = (stack.blocks, *gradient.shape[1:])
        mean, square = (
            self._state(stack, stack.ups, name, shape).view_as(gradient) for name in ("full_avg", "full_avg_sq")
        )
        full = normalized(gradient, mean, square, group, step)
        return corrected(down, up, s * up.mT @ full, s * full @ down.mT, s, group["damping"])


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


def normalized(gradient: Tensor, mean: Tensor, square: Tensor, group: Group, step: int) -> Tensor:
    """Adam: update both moments in place; return ``m' / (sqrt(v') + eps)`` of the unbiased ones."""
    beta1, beta2 = group["betas"]
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = square.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    return (mean / (1 - beta1**step)).div_(root)
