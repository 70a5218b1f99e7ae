"""The steps: forward, backward, update, and what happens between them (log, checkpoint, sample, stop)."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import UserError
from .checkpoints import list_checkpoints, prune, save_checkpoint
from .denoiser import denoiser, predict, text_encoders
from .optimization import clip, schedule_state
from .randomness import batch_rows, derive, draw_timesteps, generator, shuffled_rows
from .renders import save_samples
from .rundir import RunFolder, RunLog
from .setup import ADAPTER, Run, epoch_steps
from .signals import Interrupted, StopRequests

log = logging.getLogger(__name__)


class Stepper:
    """Walks a :class:`Run` from its first to its last step."""

    def __init__(self, run: Run, accelerator: Accelerator, folder: RunFolder, stop: StopRequests) -> None:
        self.run, self.accelerator, self.folder, self.stop = run, accelerator, folder, stop
        self.device = denoiser(run.pipe).device
        self.saved: Path | None = None

    def run_steps(self) -> list[float]:
        """All steps that are left; returns their losses. Raises :class:`Interrupted` after a signal."""
        run, folder = self.run, self.folder
        if run.first_step >= run.total_steps:
            log.warning("this run is complete at step %d: raise --max_train_steps to go on", run.first_step)
            return []
        self._start_trackers()
        journal = RunLog(folder.path / "log.jsonl", run.first_step, folder.owner)
        bar = tqdm(
            total=run.total_steps,
            initial=run.first_step,
            desc="steps",
            disable=not folder.owner,
            mininterval=0.5,
        )
        losses = []
        try:
            for step in range(run.first_step, run.total_steps):
                begun = time.monotonic()
                rate = run.schedule.get_last_lr()[0]
                loss, norm = self.step(step)
                losses.append(loss)
                done = step + 1
                seconds = round(time.monotonic() - begun, 4)
                finite = norm if math.isfinite(norm) else None  # under fp16 a step may be skipped; JSON has no inf
                journal.write(step=done, loss=loss, lr=rate, grad_norm=finite, seconds=seconds)
                folder.state("training", step=done, total=run.total_steps, loss=loss)
                bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.1e}", refresh=False)
                bar.update()
                self._track({"loss": loss, "lr": rate, "grad_norm": norm}, done)
                self._between(done)
        finally:
            journal.close()
            bar.close()
        return losses

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
        value = self._across(total).item()
        if not math.isfinite(value):
            self._refuse(step, "the loss is not finite")
        norm = self._update(step)
        run.schedule.step()
        return value, norm

    def loss(self, step: int, micro: int) -> Tensor:
        """Mean loss of one batch, plus ``prior_loss_weight`` times that of as many class pictures."""
        run, config = self.run, self.run.config
        rank = self.accelerator.process_index
        source = generator(run.seed, "step", step, micro, rank)
        # The adapter's dropout draws from the global generator, so that is a function of the step as well.
        torch.manual_seed(derive(run.seed, "dropout", step, micro, rank))
        size = config.train_batch_size or 1
        number = (step * config.gradient_accumulation_steps + micro) * self.accelerator.num_processes + rank
        sizes = [run.latents.size_of(photo) for photo in range(len(run.subject.photos))]
        photos = batch_rows(run.seed, "photos", sizes, number, size)
        latents = run.latents.sample(photos, source)
        prompts = run.wordings.draw(photos, generator(run.seed, "captions", step, micro, rank))
        if run.class_latents is not None:
            pictures = shuffled_rows(run.seed, "class pictures", len(run.class_latents.of_photo), number * size, size)
            picked = run.class_latents.pick(pictures, source, run.latents.size_of(photos[0]))
            latents = torch.cat([latents, run.class_latents.draw(picked, source)])
            prompts += [config.class_prompt or ""] * size
        losses = self._denoising_losses(latents, prompts, source)
        mean = losses[:size].mean()
        return mean + config.prior_loss_weight * losses[size:].mean() if run.class_latents is not None else mean

    def _denoising_losses(self, latents: Tensor, prompts: list[str], source: torch.Generator) -> Tensor:
        run, objective = self.run, self.run.objective
        noise = torch.randn(latents.shape, generator=source)
        stratified = run.config.timestep_sampling == "stratified"
        t = draw_timesteps(len(latents), objective.timesteps, stratified, source).to(self.device)
        latents, noise = latents.to(self.device), noise.to(self.device)
        noisy = objective.add_noise(latents, noise, t)
        lower = run.dtype != torch.float32
        with torch.autocast(self.device.type, run.dtype if lower else None, enabled=lower):
            labels = t if run.config.class_labels_conditioning == "timesteps" else None
            times = objective.times[t]
            prediction = predict(run.pipe, noisy.to(run.dtype), times, run.conditions(prompts), labels)
        return objective.losses(prediction, latents, noise, t)

    def _update(self, step: int) -> float:
        run = self.run
        self._average_gradients()
        run.scaler.unscale_(run.optimizer)
        norm = clip(run.parameters, run.config.max_grad_norm)
        if not math.isfinite(norm) and not run.scaler.is_enabled():
            self._refuse(step, "the gradients are not finite")
        if norm == 0 and step == run.first_step:
            raise UserError("no trained factor gets a gradient: nothing would be learned with these --target_modules")
        run.scaler.step(run.optimizer)
        run.scaler.update()
        return norm

    def _average_gradients(self) -> None:
        """One mean over the processes: the factors are few, so a plain reduction is enough."""
        if self.accelerator.num_processes == 1:
            return
        for parameter in self.run.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self._across(parameter.grad)

    def _across(self, value: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return value
        reduced: Tensor = self.accelerator.reduce(value, reduction="mean")
        return reduced

    def _refuse(self, step: int, what: str) -> None:
        whole = list_checkpoints(self.folder.checkpoints)
        kept = f"the last good checkpoint is {whole[-1]}" if whole else "there is no checkpoint yet"
        raise UserError(
            f"{what} at step {step + 1}, so training stopped; {kept}: lower --learning_rate, or use "
            "--mixed_precision no, and start again"
        )

    def _between(self, done: int) -> None:
        config, last = self.run.config, done == self.run.total_steps
        stopped = self._stopped()
        if last or stopped or done % config.checkpointing_steps == 0:
            self._save(done)
        if stopped and not last:
            raise Interrupted(stopped, done, self.saved)
        if config.validation_prompt and (last or done % self._sample_interval() == 0) and self.folder.owner:
            save_samples(self.run.pipe, self.folder.samples, done, config, self.run.dtype)

    def _sample_interval(self) -> int:
        config = self.run.config
        if config.validation_steps is not None:
            return config.validation_steps
        processes = self.accelerator.num_processes
        return config.validation_epochs * epoch_steps(config, len(self.run.subject.photos), processes)

    def _stopped(self) -> int:
        """The signal that any process got, or 0: all must stop at the same step."""
        received = self.stop.received or 0
        if self.accelerator.num_processes == 1:
            return received
        return int(self.accelerator.gather(torch.tensor([received], device=self.device)).max())

    def _save(self, done: int) -> None:
        run, folder = self.run, self.folder
        if not folder.owner:
            return
        folder.require(2 * self._checkpoint_bytes())
        self.saved = save_checkpoint(
            folder.checkpoints,
            done,
            run.pipe,
            ADAPTER,
            run.optimizer,
            run.parameters,
            run.identity,
            schedule_state(run.schedule),
            run.scaler.state_dict(),
            {**run.info, "step": done},
        )
        prune(folder.checkpoints, run.config.checkpoints_total_limit)

    def _checkpoint_bytes(self) -> int:
        modules = (denoiser(self.run.pipe), *text_encoders(self.run.pipe))
        frozen = sum(b.numel() * b.element_size() for m in modules for n, b in m.named_buffers() if ".nora_" in n)
        return frozen + 12 * sum(p.numel() for p in self.run.parameters.values())

    def _start_trackers(self) -> None:
        values = {k: v for k, v in self.run.config.to_dict().items() if isinstance(v, str | int | float | bool)}
        self._guarded(lambda: self.accelerator.init_trackers("nora-dreambooth", config=values))

    def end_trackers(self) -> None:
        """Let the trackers finish; a failure of theirs is a warning."""
        self._guarded(self.accelerator.end_training)

    def _track(self, values: dict[str, float], step: int) -> None:
        self._guarded(lambda: self.accelerator.log(values, step=step))

    def _guarded(self, call: Any) -> None:
        """Trackers are somebody else's service: when one fails, training goes on."""
        try:
            call()
        except Exception as error:
            log.warning("the tracker failed and is left out from here on: %s", error)
            self.accelerator.trackers = []
