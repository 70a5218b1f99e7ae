"""HaLoRA: an adapter that tolerates the noise of the hardware that stores the frozen weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ...adapters import NoraLayer
from ..hooks.step_hook import StepHook
from ..hooks.trained import RankedChain, Trained
from ..step.seeds import derive
from .weight_noise import frozen_weight, hardware_std, noise_source, weights_replaced, with_noise

SIGMA = 0.02
"""The noise in training, relative to the largest weight of a layer."""
PENALTY = 1e-3
"""The weight ``mu`` of the norms."""


class HaLoRA(StepHook):
    """HaLoRA: ``min L(W + n + s B A) + mu (norm_2(A A^T) + norm_2(B^T B))``, ``n ~ N(0, (sigma max(W))^2)``.

    The frozen weight lies in noisy memory (resistive RAM), the adapter in exact one. The noise is drawn anew for each
    step and is the same for its micro-steps and processes; ``sigma`` is :data:`SIGMA`, ``mu`` :data:`PENALTY`, and the
    norms are the mean over the layers. While a pass runs, the adapted weights are in memory twice.
    https://arxiv.org/abs/2502.19747
    """

    name = "halora"
    needs_own_pass = True

    def __init__(self, trained: Trained) -> None:
        self.trained = trained

    @contextmanager
    def around_pass(self, step: int) -> Iterator[None]:
        """Compute with noisy weights."""
        plan = self.trained.plan
        seed = derive(plan.config.seed, "weight noise", step)
        with weights_replaced(hardware_noise(list(self.trained.layers.values()), SIGMA, plan.device, seed)):
            yield

    def penalty(self, step: int) -> Tensor:
        """``mu (norm_2(A A^T) + norm_2(B^T B))``, the mean over the layers."""
        return PENALTY * mean_norms(list(self.trained.chains.values()))


def hardware_noise(
    layers: Sequence[NoraLayer], sigma: float, device: torch.device, seed: int
) -> dict[NoraLayer, Tensor]:
    """``W + n`` of each layer, ``n ~ N(0, (sigma max(W))^2)``."""
    source = noise_source(device, seed)
    weights = {layer: frozen_weight(layer) for layer in layers}
    return {layer: with_noise(weight, hardware_std(weight, sigma), source) for layer, weight in weights.items()}


def mean_norms(chains: Sequence[RankedChain]) -> Tensor:
    """``norm_2(A A^T) + norm_2(B^T B)``, the mean over chains; computed together for those of equal shape."""
    factors = [factor for chain in chains for factor in (chain.down, chain.up.t())]
    shapes = dict.fromkeys(factor.shape for factor in factors)
    groups = [torch.stack([factor for factor in factors if factor.shape == shape]) for shape in shapes]
    return torch.stack([spectral_norms(group).sum() for group in groups]).sum() / len(chains)


def spectral_norms(matrices: Tensor) -> Tensor:
    """``norm_2(M M^T) = norm(M^T u)^2`` of each ``M [k, n]``, with its first left singular vector ``u``.

    ``u`` is constant in backward, which gives the exact gradient ``2 u u^T M`` without that of a decomposition.
    """
    with torch.no_grad():
        grams = matrices @ matrices.transpose(-1, -2)
        vectors = torch.linalg.eigh(grams.cpu().double()).eigenvectors[..., -1].to(matrices)
    return torch.einsum("bk,bkn->bn", vectors, matrices).square().sum(-1)
