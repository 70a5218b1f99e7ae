"""LoRA-RITE: steps of a low-rank pair that do not depend on how the update is split into its factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .matrices import eigh, inverse_root, noise
from .paired import Group, PairedOptimizer, Params, Stack


class LoRARite(PairedOptimizer):
    """LoRA-RITE: ``B - lr mean(gB R^-1 V^(-1/2)) R^-T, A^T = U R``, the same ``dW`` for ``(B C, C^-1 A)``.

    Each factor is stepped in an orthonormal basis of the other. For ``B [d_out, r]``, with ``A^T = U R``, ``U^T U = I``
    (for ``A`` the roles are swapped)::

        g = gB R^-1                                           the unmagnified gradient
        T = U_t^T U_(t-1)                                     the change of basis
        V = b2 T V T^T + (1 - b2) g^T g / d_out               second moment, [r, r]
        e = b2 (e + max_i |eig_i(V_(t-1)) - eig_i(T V T^T)|)  the mass that escaped from the basis
        S = g (V + e I)^(-1/2)
        M = b1 M T^T + (1 - b1) S                             first moment
        B = B - lr M R^-T

    with Adam's bias correction in ``b1`` and ``b2``. ``R = diag(sqrt(q)) E^T`` comes from ``A A^T = E diag(q) E^T``:
    any other basis gives the same step, and this one shows directions in which ``A`` has no mass. There ``B`` does not
    move, so the first step, at ``B = 0``, changes ``B`` only. All else as in :class:`PairedOptimizer`.

    Raises ``ValueError`` for factors that are no pair, and for options out of range.

    Paper: https://arxiv.org/abs/2410.20625
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
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, lr_ratio=lr_ratio)

    def _step_pairs(self, stack: Stack, group: Group, step: int) -> None:
        owners = stack.downs, stack.ups
        down, up = stack.matrices(stack.downs), stack.matrices(stack.ups)
        gradients = stack.gradients(stack.downs), stack.gradients(stack.ups).mT
        factors = down, up.mT  # both wide, [n, r, d], so that the same code serves them; views of what is written
        grams = eigh(*(factor @ factor.mT for factor in factors))
        inverses = [vectors * inverse_root(values)[:, None, :] for values, vectors in grams]
        turns = [self._turn(stack, *each) for each in zip(owners, factors, inverses, strict=True)]
        # Each factor moves in the basis of the other one.
        inverses, turns = inverses[::-1], turns[::-1]
        roots = self._roots(stack, gradients, inverses, turns, group, step)
        beta1 = unbiased(group["betas"][0], step)
        for side, factor in enumerate(factors):
            rate = group["lr"] * (group["lr_ratio"] if side else 1.0)
            mean = self._factor_state(stack, owners[side], "exp_avg")
            mean = mean.mT if side else mean
            fresh = (roots[side] @ inverses[side].mT) @ gradients[side]
            mean.copy_(torch.baddbmm(fresh, turns[side], mean, beta=1 - beta1, alpha=beta1))
            factor.copy_(
                torch.baddbmm(factor, inverses[side], mean, beta=1 - rate * group["weight_decay"], alpha=-rate)
            )
        stack.write(stack.downs, down)
        stack.write(stack.ups, up)

    def _turn(self, stack: Stack, owners: list[nn.Parameter], factor: Tensor, inverse: Tensor) -> Tensor:
        """The change of a factor's basis ``T = U_t^T U_(t-1) [n, r, r]`` since the last step; the basis is kept."""
        basis, earlier = inverse.mT @ factor, self._factor_state(stack, owners, "basis")
        earlier = earlier if owners is stack.downs else earlier.mT
        turn = basis @ earlier.mT
        earlier.copy_(basis)
        return turn

    def _roots(
        self,
        stack: Stack,
        gradients: Sequence[Tensor],
        inverses: Sequence[Tensor],
        turns: Sequence[Tensor],
        group: Group,
        step: int,
    ) -> list[Tensor]:
        """``(V + e I)^(-1/2) [n, r, r]`` of both factors, after their second moments have been updated."""
        beta2 = unbiased(group["betas"][1], step)
        r = turns[0].shape[-1]
        moments, spectra, masses = (
            [self._state(stack, own, name, (stack.blocks, *shape)).flatten(0, 1) for own in (stack.downs, stack.ups)]
            for name, shape in (("second_moment", (r, r)), ("spectrum", (r,)), ("escaped", ()))
        )  # fmt: skip
        carried = [turn @ moment @ turn.mT for turn, moment in zip(turns, moments, strict=True)]
        kept = eigh(*carried)
        for moment, before, gradient, inverse in zip(moments, carried, gradients, inverses, strict=True):
            gram = inverse.mT @ (gradient @ gradient.mT) @ inverse
            moment.copy_(before.mul_(beta2).add_(gram, alpha=(1 - beta2) / gradient.shape[-1]))
        roots = []
        for (values, vectors), (old, _), spectrum, mass in zip(eigh(*moments), kept, spectra, masses, strict=True):
            mass.add_((spectrum - old).clamp_(min=0).amax(-1)).mul_(beta2)
            spectrum.copy_(values)
            # Directions without a gradient hold rounding errors, which must not become steps of full size.
            denominator = torch.maximum(values, noise(values)).add_(mass[:, None]).sqrt_().add_(group["eps"])
            roots.append((vectors / denominator[:, None, :]) @ vectors.mT)
        return roots


def unbiased(beta: float, step: int) -> float:
    """The rate of an exponential mean that begins at its first value: Adam's bias correction, put into ``beta``."""
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)
