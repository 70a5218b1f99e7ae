"""The training loop: forward, backward, update, log, checkpoint, validate, stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from ..measuring.samples import save_samples
from ..planning.adapter import frozen_factors
from ..planning.checkpoints import prune
from ..planning.identity import can_extend
from ..planning.rundir import RunFolder
from ..signals import Interrupted, StopRequests
from ..step.averaging import averaged
from ..step.memory import checkpoint_bytes
from .batches import Batches
from .journal import Journal
from .run import Run, save_checkpoint
from .updates import Updates

log = logging.getLogger(__name__)

ENDED = "its learning rate schedule ends there; start a longer run in another --output_dir"


class Stepper:
    """Trains a :class:`Run` from its first to its last step."""

    def __init__(
        self, run: Run, accelerator: Accelerator, folder: RunFolder, stop: StopRequests, progress: bool = True
    ) -> None:
        self.run, self.accelerator, self.folder, self.stop = run, accelerator, folder, stop
        self.batches = Batches(run.data, run.embeddings, accelerator.process_index)
        self.updates = Updates(run, accelerator, folder)
        self.journal = Journal(run, folder, progress)
        self.saved_step: int | None = None
        """Step of the last checkpoint written since this start."""

    def run_steps(self) -> None:
        """Train all remaining steps. Raises :class:`Interrupted` after a signal."""
        run = self.run
        if run.first_step == run.last_step:
            more = "raise --max_train_steps to continue" if can_extend(run.config) else ENDED
            log.warning("this run is complete at step %d: %s", run.first_step, more)
        with self.journal:
            self.measure(run.first_step)  # after a resume too: the run may have been killed before it had measured
            for step in range(run.first_step, run.last_step):
                started, rate = time.monotonic(), run.schedule.get_last_lr()[0]
                loss, norm = self.step(step)
                self.journal.record(step + 1, loss, rate, norm, time.monotonic() - started)
                self.after_step(step + 1)
                if step + 1 == run.last_step:
                    break  # early stopping lowered last_step

    def step(self, step: int) -> tuple[float, float]:
        """One optimizer step over all micro-steps; return its mean loss and the gradient norm.

        Raises :class:`UserError` before anything is updated if the loss or the gradients are not finite.
        """
        run = self.run
        run.optimizer.zero_grad(set_to_none=True)
        run.hooks.before_step(step)
        total = torch.zeros((), device=run.plan.device)
        for micro in range(run.config.gradient_accumulation_steps):
            total += self.backward(step, micro)
        return self.updates.apply(step, total)

    def backward(self, step: int, micro: int) -> Tensor:
        """Forward and backward pass of one micro-step; return its share of the step's loss, without penalties."""
        with self.run.hooks.around_pass(step):
            loss, total = self.share_of(step, self.loss(step, micro))
            torch.autograd.backward(total)
        return loss

    def loss(self, step: int, micro: int) -> Tensor:
        """The loss of one micro-step."""
        return self.batches.loss(step, micro)

    def share_of(self, step: int, loss: Tensor) -> tuple[Tensor, Tensor]:
        """A micro-step's share of the step's loss, detached; and what its backward pass starts from."""
        run = self.run
        share = 1 / run.config.gradient_accumulation_steps
        return share * loss.detach(), run.scaler.scale(run.hooks.with_penalties(share * loss, step, share))

    def after_step(self, done: int) -> None:
        """Work that is due after step ``done``: checkpoint, stop after a signal, samples, validation."""
        last, stopped = done == self.run.last_step, self.stopped()
        if stopped or self.saves_at(done):
            self.save(done)
        if stopped and not last:
            raise Interrupted(stopped, done, self.saved)
        self.measure(done)
        if done == self.run.last_step and not last:
            self.save(done)

    @property
    def saved(self) -> Path | None:
        """The last checkpoint written since this start."""
        return None if self.saved_step is None else self.folder.checkpoints / f"step-{self.saved_step}"

    def saves_at(self, done: int) -> bool:
        """Whether the run writes a checkpoint after step ``done``."""
        return done == self.run.last_step or done % self.run.config.checkpointing_steps == 0

    def measures_at(self, done: int) -> bool:
        """Whether the run saves samples and validates after step ``done``."""
        return done == self.run.last_step or done % self.run.plan.sample_interval == 0

    def measure(self, done: int) -> None:
        """Save samples and validate if due; lower ``run.last_step`` if the run stops early."""
        run, folder = self.run, self.folder
        if folder.owner and self.measures_at(done):
            with averaged(run.parameters, run.optimizer, run.average), run.hooks.as_saved():
                if prompt := run.config.validation_prompt:
                    save_samples(run.pipe, folder.samples, done, prompt, run.config, run.plan.dtype)
                if run.validation is not None and (point := run.validation.measure_step(done, run.adapter, run.info)):
                    self.journal.measured(done, point.scores)
        if run.validation is not None and self._maximum(int(run.validation.should_stop)):
            log.info("stopped early: no later step was better than step %s", run.validation.chosen)
            run.last_step = done

    def stopped(self) -> int:
        """The signal that any process received, or 0, so that all stop at the same step."""
        return self._maximum(self.stop.received or 0)

    def _maximum(self, value: int) -> int:
        """The maximum of a value over all processes."""
        if self.accelerator.num_processes == 1:
            return value
        return int(self.accelerator.gather(torch.tensor([value], device=self.run.plan.device)).max())

    def save(self, done: int) -> None:
        """Write the checkpoint of step ``done``, then delete the ones beyond ``checkpoints_total_limit``."""
        self.write_checkpoint(done)
        self.prune()

    def write_checkpoint(self, done: int, together: Sequence[str] = ()) -> None:
        """Write the checkpoint of step ``done``. ``together``: the subjects that write theirs at the same time.

        Raises :class:`UserError` if the disk is full.
        """
        run, folder = self.run, self.folder
        if not folder.owner:
            return
        frozen = frozen_factors(run.pipe)
        size = checkpoint_bytes(run.trained, sum(factor.nbytes for factor in frozen), len(run.parameters) + len(frozen))
        folder.require(2 * size)
        folder.sync_log()
        previous = run.first_step if self.saved_step is None else self.saved_step
        save_checkpoint(run, done, previous, together)
        self.saved_step = done

    def prune(self) -> None:
        """Delete the checkpoints beyond ``checkpoints_total_limit``."""
        if self.folder.owner:
            prune(self.folder.checkpoints, self.run.config.checkpoints_total_limit)

    def end(self) -> None:
        """Close the trackers and end the process group."""
        self.journal.finish()
        self.accelerator.end_training()
