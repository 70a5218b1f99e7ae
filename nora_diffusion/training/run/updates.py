"""Update the parameters: gradient all-reduce, hooks, clipping, optimizer, norm guard, EMA, schedule."""

from __future__ import annotations

import functools
import math

import torch
from accelerate import Accelerator
from torch import Tensor

from ...adapters import NoraLayer
from ...errors import UserError
from ...io.run_layout import checkpoint_steps
from ...pipelines.components import components, nora_layers
from ..planning.rundir import RunFolder
from ..step.optimization import bound_norms, clip, drop_finished_gradients
from .run import Run

MAX_SKIPS = 20
"""Consecutive steps that may be skipped because fp16 gradients overflow, before training stops."""
MAX_ZERO_STEPS = 100
"""Steps at the start of a run, and at least one pass over the photos, that may have a gradient of exactly 0."""


class Updates:
    """The parameter updates of a :class:`Run`."""

    def __init__(self, run: Run, accelerator: Accelerator, folder: RunFolder) -> None:
        self.run, self.accelerator, self.folder = run, accelerator, folder
        self.skipped = 0
        """Consecutive skipped steps since this start. Not saved: checkpoints have the state of the scaler."""
        earlier = [loss for step, loss, _ in folder.steps() if step <= run.first_step]
        self.has_learned = any(loss > 0 for loss in earlier) or (run.first_step > 0 and not earlier)
        """Whether any step had a gradient. A checkpoint without a log was judged when it was written."""

    def apply(self, step: int, total: Tensor) -> tuple[float, float]:
        """Apply the accumulated gradients of a step with mean loss ``total``; return loss and gradient norm.

        Raises :class:`UserError` before anything is updated if the loss or the gradients are not finite.
        """
        run = self.run
        loss = self._mean(total).item()
        if not math.isfinite(loss):
            self._refuse(step, "the loss is not finite")
        self._average_gradients()
        dropped = drop_finished_gradients(run.parameters, run.config, step)
        first = run.schedule.last_epoch == 0  # counts the steps that were not skipped
        norm = self._update(step)
        self.has_learned = self.has_learned or (norm > 0 and self._has_gradients())
        if not self.has_learned and step + 1 >= min(run.last_step, max(MAX_ZERO_STEPS, run.plan.epoch_steps)):
            raise UserError(
                f"the gradient of all {step + 1} steps is exactly 0, so nothing was learned and no adapter is written: "
                "check the photos and their masks, --background_loss_weight, --max_grad_norm and the range of timesteps"
            )
        # A loss of 0 has no gradient. It occurs if a crop misses the subject and the background has weight 0.
        if norm == 0 and loss > 0 and first and not dropped:
            raise UserError(
                "no trained parameter gets a gradient, so nothing would be learned: choose other --target_modules"
            )
        return loss, norm

    def _has_gradients(self) -> bool:
        """Whether any gradient is left after clipping, which a tiny ``max_grad_norm`` rounds to 0."""
        return any(p.grad is not None and bool(p.grad.any()) for p in self.run.parameters.values())

    def _update(self, step: int) -> float:
        """Step optimizer, norm guard, hooks, EMA, schedule; return the gradient norm. A skipped step changes none."""
        run = self.run
        has_gradient = any(parameter.grad is not None for parameter in run.parameters.values())
        # The scaler raises if no parameter has a gradient.
        norm, taken = self._step_optimizer(step) if has_gradient else (0.0, True)
        if not taken:
            self._skip(step)
            return norm
        self.skipped = 0
        if run.config.scale_weight_norms is not None:
            bound_norms(self._layers, run.adapter, run.config.scale_weight_norms)
        run.hooks.after_step(step)
        if run.average is not None:
            run.average.update(run.parameters, step + 1)
        run.schedule.step()
        return norm

    def _step_optimizer(self, step: int) -> tuple[float, bool]:
        """Step the optimizer; return the gradient norm, and False if the scaler skipped the step (fp16 overflow)."""
        run = self.run
        run.scaler.unscale_(run.optimizer)
        run.hooks.after_backward(step)
        norm = clip(run.parameters, run.config.max_grad_norm)
        if not math.isfinite(norm) and not run.scaler.is_enabled():
            self._refuse(step, "the gradients are not finite")
        scale = run.scaler.get_scale()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        return norm, run.scaler.get_scale() >= scale

    def _skip(self, step: int) -> None:
        """Count a skipped step. Raises :class:`UserError` after too many, or if the whole run was skipped."""
        self.skipped += 1
        # The scale starts at 2^16 and halves at each skip: below 1 it is not the cause of the overflow.
        if self.skipped >= MAX_SKIPS or self.run.scaler.get_scale() < 1:
            self._refuse(step, "the gradients overflow fp16 at every loss scale")
        if step + 1 == self.run.last_step and self.run.schedule.last_epoch == 0:
            self._refuse(step, "the gradients overflowed fp16 at every step, and nothing was learned")

    @functools.cached_property
    def _layers(self) -> list[NoraLayer]:
        """The layers with the run's adapter."""
        modules = components(self.run.pipe).values()
        return [layer for module in modules for layer in nora_layers(module, self.run.adapter).values()]

    def _average_gradients(self) -> None:
        """All-reduce the mean gradient in one flat buffer; a parameter without a gradient anywhere keeps none."""
        if self.accelerator.num_processes == 1:
            return
        parameters = list(self.run.parameters.values())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        present = gradients[0].new_tensor([p.grad is not None for p in parameters])
        mean = self._mean(torch.cat([present, *(gradient.flatten() for gradient in gradients)]))
        present, *gradients = mean.split([len(parameters), *(p.numel() for p in parameters)])
        for parameter, anywhere, gradient in zip(parameters, present.tolist(), gradients, strict=True):
            if anywhere:
                parameter.grad = torch.empty_like(parameter).copy_(gradient.view(parameter.shape))

    def _mean(self, value: Tensor) -> Tensor:
        """The mean over the processes."""
        if self.accelerator.num_processes == 1:
            return value
        reduced: Tensor = self.accelerator.reduce(value, reduction="mean")
        return reduced

    def _refuse(self, step: int, reason: str) -> None:
        checkpoints = list(checkpoint_steps(self.folder.checkpoints).values())
        state = f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"
        cause = "lower --learning_rate" if self.run.schedule.last_epoch else "check the photos and the base's weights"
        raise UserError(
            f"{reason} at step {step + 1}, so training stopped; {state}: {cause}, or use --mixed_precision no, and "
            "start again"
        )
