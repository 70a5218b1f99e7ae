"""The steps: forward, backward, update, and what happens between them (log, checkpoint, sample, stop)."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ...adapters import NoraLayer
from ...errors import UserError
from ...io.run_layout import LOG, checkpoint_steps
from ...pipelines.components import component, nora_layers, present, without_adapters
from ..measuring.samples import save_samples
from ..settings.checks import trackers
from ..step.averaging import shown
from ..step.denoiser import TextEmbeddings, denoiser, predict
from ..step.memory import checkpoint_bytes
from ..step.noise import draw_levels, draw_noise
from ..step.optimization import bound_norms, clip, schedule_state, still
from ..step.randomness import balanced_indices, batch_indices, derive, generator, owned_indices, shuffled_indices
from .checkpoints import prune, save_checkpoint
from .identity import may_go_on
from .rundir import RunFolder, RunLog
from .setup import Run, epoch_steps, frozen_factors
from .signals import Interrupted, StopRequests
from .tracking import Trackers

log = logging.getLogger(__name__)

ENDED = "its schedule ends there, and a longer run starts anew in another --output_dir"
MOST_SKIPS = 20
"""Steps in a row that fp16 may leave out for gradients that overflow, before the run is given up."""


@dataclass(frozen=True)
class Batch:
    """A noised batch: what the denoiser is given and, in ``target`` and ``t``, what it is judged by."""

    target: Tensor
    t: Tensor
    noisy: Tensor
    times: Tensor
    embeddings: TextEmbeddings
    labels: Tensor | None
    regions: Tensor | None = None


class Stepper:
    """Walks a :class:`Run` from its first to its last step."""

    def __init__(self, run: Run, accelerator: Accelerator, folder: RunFolder, stop: StopRequests) -> None:
        self.run, self.accelerator, self.folder, self.stop = run, accelerator, folder, stop
        self.device = denoiser(run.pipe).device
        self.saved: Path | None = None
        self.skipped = 0  # in a row, since this start; across starts the scaler's own state holds how far it sank
        self._trackers = Trackers([], folder.path, {})

    def run_steps(self) -> list[float]:
        """All steps that are left; returns their losses. Raises :class:`Interrupted` after a signal."""
        run = self.run
        if run.first_step >= run.total_steps:
            more = "raise --max_train_steps to go on" if may_go_on(run.config) else ENDED
            log.warning("this run is complete at step %d: %s", run.first_step, more)
            return []
        losses = []
        with self.recording():
            self.look(run.first_step)
            for step in range(run.first_step, run.total_steps):
                begun, rate = time.monotonic(), run.schedule.get_last_lr()[0]
                loss, norm = self.step(step)
                losses.append(loss)
                self.record(step + 1, loss, rate, norm, time.monotonic() - begun)
                self.between(step + 1)
                if step + 1 == run.total_steps:
                    break  # it may have been stopped early
        return losses

    @contextmanager
    def recording(self, progress: bool = True) -> Iterator[None]:
        """The time in which :meth:`record` may be called: the log is open and the trackers have begun."""
        run, folder = self.run, self.folder
        self._trackers = self._start_trackers()
        self._journal = RunLog(folder.path / LOG, run.first_step, folder.owner)
        self._bar = tqdm(
            total=run.total_steps,
            initial=run.first_step,
            desc="steps",
            disable=not (folder.owner and progress),
            mininterval=0.5,
        )
        try:
            yield
        finally:
            self._journal.close()
            self._bar.close()

    def record(self, done: int, loss: float, rate: float, norm: float, seconds: float) -> None:
        """Tell the log, ``state.json``, the progress bar and the trackers of a step."""
        finite = norm if math.isfinite(norm) else None  # under fp16 a step may be skipped; JSON has no inf
        self._journal.write(step=done, loss=loss, lr=rate, grad_norm=finite, seconds=round(seconds, 4))
        self.folder.state("training", step=done, total=self.run.total_steps, loss=loss)
        self._bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.1e}", refresh=False)
        self._bar.update()
        self._trackers.log({"loss": loss, "lr": rate, "grad_norm": norm}, done)

    def step(self, step: int) -> tuple[float, float]:
        """One optimizer step over all micro-steps; returns its mean loss and the gradients' norm.

        Raises :class:`UserError` before anything is updated if the loss or the gradients are not finite.
        """
        run = self.run
        count = run.config.gradient_accumulation_steps
        run.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for micro in range(count):
            loss = self.loss(step, micro) / count
            torch.autograd.backward(run.scaler.scale(loss))
            total += loss.detach()
        return self.update(step, total)

    def update(self, step: int, total: Tensor) -> tuple[float, float]:
        """Apply the accumulated gradients of a step whose mean loss is ``total``; returns as :meth:`step` does."""
        run = self.run
        value = self._across(total).item()
        if not math.isfinite(value):
            self._refuse(step, "the loss is not finite")
        self._average_gradients()
        stopped = still(run.parameters, run.config, step, run.config.max_train_steps or 0)
        first = run.schedule.last_epoch == 0  # it counts the steps that were taken
        norm = self._update(step)
        # A loss of 0 gives none: that of a first crop beside the subject, where the background does not count.
        if norm == 0 and value > 0 and first and not stopped:
            raise UserError("no trained factor gets a gradient: nothing would be learned with these --target_modules")
        return value, norm

    def loss(self, step: int, micro: int) -> Tensor:
        """Mean loss of one batch, plus ``prior_loss_weight`` times that of as many class pictures."""
        batch = self.draw(step, micro)
        with self.autocast():
            prediction = predict(self.run.pipe, batch.noisy, batch.times, batch.embeddings, batch.labels)
        return self.mean_loss(batch, prediction)

    def draw(self, step: int, micro: int) -> Batch:
        """The batch of a micro-step, noised, and what is needed to judge the prediction for it."""
        run, config = self.run, self.run.config
        # All processes draw the one batch that one process would, and each takes its rows of it. Only masks of dropout
        # are its own; a sampled rank is not. The last 0 is the first process: it draws what it draws alone.
        source = generator(run.seed, "step", step, micro, 0)
        # The adapter's dropout draws from the global generator, so that is a function of the step as well.
        own = self.accelerator.process_index if config.dropout > 0 else 0
        torch.manual_seed(derive(run.seed, "dropout", step, micro, own))
        size = config.batch_size * self.accelerator.num_processes
        number = step * config.gradient_accumulation_steps + micro
        photos = self._photos(number, size)
        picked = run.latents.pick(photos, source)
        latents, regions = run.latents.draw(picked, source), run.latents.weights(picked)
        prompts = run.caption_variants.draw(photos, generator(run.seed, "captions", step, micro, 0))
        if run.class_latents is not None:
            pictures = shuffled_indices(
                run.seed, "class pictures", len(run.class_latents.of_image), number * size, size
            )
            picked = run.class_latents.pick(pictures, source, run.latents.size_of(photos[0]))
            latents = torch.cat([latents, run.class_latents.draw(picked, source)])
            regions = None if regions is None else torch.cat([regions, torch.ones_like(regions)])
            prompts += [config.class_prompt or ""] * size
        elif config.with_prior_preservation:  # by the frozen base: the same photos, called by the class alone
            latents = torch.cat([latents, latents])
            regions = None if regions is None else torch.cat([regions, torch.ones_like(regions)])
            prompts += [run.class_prompts[photo] for photo in photos]
        return self._noised(latents, prompts, source, regions)

    def _photos(self, number: int, size: int) -> list[int]:
        run = self.run
        sizes = [run.latents.size_of(photo) for photo in range(len(run.subject.photos))]
        if run.subject.members and len(set(sizes)) > 1:
            return owned_indices(run.seed, "photos", run.subject.owners, sizes, number, size)
        if run.subject.members:
            return balanced_indices(run.seed, "photos", run.subject.owners, number * size, size)
        return batch_indices(run.seed, "photos", sizes, number, size)

    def mean_loss(self, batch: Batch, prediction: Tensor) -> Tensor:
        """What :meth:`loss` is for a batch's prediction."""
        run, config = self.run, self.run.config
        losses = run.objective.losses(prediction, batch.target, batch.t, batch.regions)
        size = config.batch_size
        mean = losses[:size].mean()
        return mean + config.prior_loss_weight * losses[size:].mean() if len(losses) > size else mean

    def autocast(self) -> torch.autocast:
        """Half precision where the run asks for it."""
        lower = self.run.dtype in (torch.float16, torch.bfloat16)
        return torch.autocast(self.device.type, self.run.dtype if lower else None, enabled=lower)

    def _noised(self, latents: Tensor, prompts: list[str], source: torch.Generator, regions: Tensor | None) -> Batch:
        run, objective = self.run, self.run.objective
        noise, added = draw_noise(latents.shape, run.config, source)
        t = draw_levels(len(latents), objective.timesteps, run.config, source)
        rows = self._own_rows(len(latents))
        latents, noise, added, t = (value[rows].to(self.device) for value in (latents, noise, added, t))
        prompts, regions = [prompts[row] for row in rows], None if regions is None else regions[rows]
        noisy, target = objective.add_noise(latents, added, t), objective.target(latents, noise, t)
        labels = t if run.config.class_labels_conditioning == "timesteps" else None
        with self.autocast():
            embeddings = run.embeddings(prompts)
        regions = None if regions is None else regions.to(self.device)
        batch = Batch(target, t, noisy.to(run.dtype), objective.times[t], embeddings, labels, regions)
        frozen = run.config.with_prior_preservation and run.class_latents is None
        return self._with_frozen_targets(batch, prompts) if frozen else batch

    def _own_rows(self, rows: int) -> list[int]:
        """This process's share of a batch: of its photos, and of what is practiced beside them."""
        size, accelerator = self.run.config.batch_size, self.accelerator
        first = size * accelerator.process_index
        return [row for row in range(rows) if first <= row % (size * accelerator.num_processes) < first + size]

    @torch.no_grad()
    def _with_frozen_targets(self, batch: Batch, prompts: list[str]) -> Batch:
        """The second half of the batch is judged by what the base predicts for it with all adapters off."""
        half = len(prompts) // 2
        labels = None if batch.labels is None else batch.labels[half:]
        with without_adapters(self.run.pipe), self.autocast():
            embeddings = self.run.embeddings(prompts[half:])
            prediction = predict(self.run.pipe, batch.noisy[half:], batch.times[half:], embeddings, labels)
        if prediction.shape[1] == 2 * batch.target.shape[1]:
            prediction = prediction.chunk(2, dim=1)[0]
        return replace(batch, target=torch.cat([batch.target[:half], prediction.to(batch.target.dtype)]))

    def _update(self, step: int) -> float:
        """Move the factors, and what follows their moves; after a skipped step all stay. Returns the norm."""
        run = self.run
        learns = any(factor.grad is not None for factor in run.parameters.values())
        # The scaler fails where there is no gradient.
        norm, taken = self._step_optimizer(step) if learns else (0.0, True)
        if not taken:
            self._skip(step)
            return norm
        self.skipped = 0
        if run.config.scale_weight_norms is not None:
            bound_norms(self._layers, run.adapter, run.config.scale_weight_norms)
        if run.average is not None:
            run.average.update(run.parameters, step + 1)
        run.schedule.step()
        return norm

    def _step_optimizer(self, step: int) -> tuple[float, bool]:
        """The gradients' norm, and whether the step was taken: the scaler leaves it out where they overflow fp16."""
        run = self.run
        run.scaler.unscale_(run.optimizer)
        norm = clip(run.parameters, run.config.max_grad_norm)
        if not math.isfinite(norm) and not run.scaler.is_enabled():
            self._refuse(step, "the gradients are not finite")
        scale = run.scaler.get_scale()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        return norm, run.scaler.get_scale() >= scale

    def _skip(self, step: int) -> None:
        """Count a step that was left out. Raises :class:`UserError` where there is no end of them, or of the run."""
        self.skipped += 1
        # The scale starts at 2^16 and halves each time: below 1 it is not the scale that makes them overflow.
        if self.skipped >= MOST_SKIPS or self.run.scaler.get_scale() < 1:
            self._refuse(step, "the gradients overflow fp16 however they are scaled")
        if step + 1 == self.run.total_steps and self.run.schedule.last_epoch == 0:
            self._refuse(step, "the gradients overflowed fp16 at every step, and nothing was learned")

    @functools.cached_property
    def _layers(self) -> list[NoraLayer]:
        """The layers that hold the run's adapter, which stay the same from its first to its last step."""
        pipe, adapter = self.run.pipe, self.run.adapter
        return [layer for part in present(pipe) for layer in nora_layers(component(pipe, part), adapter).values()]

    def _average_gradients(self) -> None:
        """One mean over the processes, in one message; a factor that has a gradient nowhere keeps none."""
        if self.accelerator.num_processes == 1:
            return
        factors = list(self.run.parameters.values())
        parts = [torch.zeros_like(factor) if factor.grad is None else factor.grad for factor in factors]
        there = parts[0].new_tensor([factor.grad is not None for factor in factors])
        mean = self._across(torch.cat([there, *(part.flatten() for part in parts)]))
        sizes = [len(factors), *(factor.numel() for factor in factors)]
        there, *parts = mean.split(sizes)
        for factor, anywhere, part in zip(factors, there.tolist(), parts, strict=True):
            if anywhere:
                factor.grad = torch.empty_like(factor).copy_(part.view(factor.shape))

    def _across(self, value: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return value
        reduced: Tensor = self.accelerator.reduce(value, reduction="mean")
        return reduced

    def _refuse(self, step: int, what: str) -> None:
        whole = list(checkpoint_steps(self.folder.checkpoints).values())
        kept = f"the last good checkpoint is {whole[-1]}" if whole else "there is no checkpoint yet"
        raise UserError(
            f"{what} at step {step + 1}, so training stopped; {kept}: lower --learning_rate, or use "
            "--mixed_precision no, and start again"
        )

    def between(self, done: int) -> None:
        """What happens after a step: a checkpoint, an end by signal, samples and measurements, an early end."""
        last, stopped = done == self.run.total_steps, self._stopped()
        if last or stopped or done % self.run.config.checkpointing_steps == 0:
            self._save(done)
        if stopped and not last:
            raise Interrupted(stopped, done, self.saved)
        self.look(done)
        if done == self.run.total_steps and not last:
            self._save(done)

    def due(self, done: int) -> bool:
        """Whether :meth:`between` has anything to do after step ``done``."""
        intervals = (self.run.config.checkpointing_steps, self._sample_interval())
        return done == self.run.total_steps or self._stopped() > 0 or any(done % n == 0 for n in intervals)

    def look(self, done: int) -> None:
        """Samples and measurements, if they are due; ``total_steps`` becomes ``done`` where that is enough."""
        run, folder = self.run, self.folder
        if folder.owner and (done == run.total_steps or done % self._sample_interval() == 0):
            with shown(run.parameters, run.optimizer, run.average):
                if run.config.validation_prompt:
                    save_samples(run.pipe, folder.samples, done, run.config, run.dtype)
                if run.validation is not None and (point := run.validation.at(done, run.adapter, run.info)):
                    self._trackers.log({f"validation/{name}": value for name, value in point.scores.items()}, done)
        if run.validation is not None and self._any(int(run.validation.enough)):
            log.info("stopped early: nothing was better than step %s", run.validation.chosen)
            run.total_steps = done

    def _sample_interval(self) -> int:
        config = self.run.config
        if config.validation_steps is not None:
            return config.validation_steps
        processes = self.accelerator.num_processes
        return config.validation_epochs * epoch_steps(config, len(self.run.subject.photos), processes)

    def _stopped(self) -> int:
        """The signal that any process got, or 0: all must stop at the same step."""
        return self._any(self.stop.received or 0)

    def _any(self, value: int) -> int:
        """The largest over the processes."""
        if self.accelerator.num_processes == 1:
            return value
        return int(self.accelerator.gather(torch.tensor([value], device=self.device)).max())

    def _save(self, done: int) -> None:
        run, folder = self.run, self.folder
        if not folder.owner:
            return
        frozen = frozen_factors(run.pipe)
        size = checkpoint_bytes(run.trained, sum(factor.nbytes for factor in frozen), len(run.parameters) + len(frozen))
        folder.require(2 * size)
        folder.sync_log()
        self.saved = save_checkpoint(
            folder.checkpoints,
            done,
            run.pipe,
            run.adapter,
            run.optimizer,
            run.parameters,
            run.identity,
            schedule_state(run.schedule),
            run.scaler.state_dict(),
            {**run.info, "step": done},
            None if run.average is None else run.average.tensors(),
        )
        prune(folder.checkpoints, run.config.checkpoints_total_limit)

    def _start_trackers(self) -> Trackers:
        config = self.run.config
        values = {k: v for k, v in config.to_dict().items() if isinstance(v, str | int | float | bool)}
        names = trackers(config) if self.folder.owner else []
        return Trackers(names, self.folder.path / config.logging_dir, values)

    def end_trackers(self) -> None:
        """Let the trackers finish, and the processes part."""
        self._trackers.finish()
        self.accelerator.end_training()
