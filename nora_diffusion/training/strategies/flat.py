"""Flat-LoRA: a flat optimum of the merged weight, by training under random perturbations of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...adapters import NoraLayer
from ...adapters.deltas.functional import at_least_single
from ...adapters.deltas.magnitude import row_norms
from ..hooks.step_hook import StepHook
from ..hooks.trained import Trained
from ..step.seeds import derive
from .weight_noise import frozen_weight, noise_source, weights_replaced, with_noise

SIGMA = 0.05
"""The published code's ``rho``: the norm of a row's noise over the norm of the row, at the end of the run."""


class Flat(StepHook):
    """Flat-LoRA: ``min E[L(W + s B A + e)]``, ``e_ij ~ N(0, sigma_t^2 / d_in * norm(W'_i)^2)``, ``W' = W + s B A``.

    The noise is drawn anew for each step and is the same for its micro-steps and processes; ``sigma_t`` rises from 0 to
    :data:`SIGMA` by a cosine. The update is taken without it. While a pass runs, the adapted weights are in memory
    twice. https://arxiv.org/abs/2409.14396
    """

    name = "flat"
    needs_own_pass = True

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        self.steps = trained.plan.config.max_train_steps

    @contextmanager
    def around_pass(self, step: int) -> Iterator[None]:
        """Compute with noisy weights."""
        plan = self.trained.plan
        source = noise_source(plan.device, derive(plan.config.seed, "weight noise", step))
        sigma = SIGMA * rising(step, self.steps)
        layers = self.trained.layers.values()
        noisy = {
            layer: with_noise(frozen_weight(layer), noise_of_rows(layer, self.trained.adapter, sigma), source)
            for layer in layers
        }
        with weights_replaced(noisy):
            yield


def rising(step: int, steps: int) -> float:
    """``(1 - cos(pi t / T)) / 2``: from 0 at the first step to 1 at the end of the run."""
    return (1 - math.cos(math.pi * min(step / steps, 1.0))) / 2


@torch.no_grad()
def noise_of_rows(layer: NoraLayer, adapter: str, sigma: float) -> Tensor:
    """``sigma / sqrt(d_in) * norm(W'_i)`` of each output row of the merged weight, ``[d_out]``."""
    delta: Any = layer.delta(adapter)
    weight = at_least_single(frozen_weight(layer)).flatten(1)
    down, up = delta.pair()
    norms = row_norms(weight, down, up, layer.states[adapter].native_scale)
    return sigma / math.sqrt(weight.shape[1]) * norms
