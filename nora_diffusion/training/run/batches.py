"""Draws the batches of a run and computes their loss."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...pipelines.components import components, without_adapters
from ...pipelines.precision import lowered
from ..data.prompts import PromptEmbeddings
from ..step.denoiser import TextEmbeddings, predict
from ..step.noise import draw_noise, draw_timesteps
from ..step.randomness import balanced_indices, batch_indices, generator, owned_indices, shuffled_indices
from ..step.seeds import derive
from .encoding import RunData


@dataclass(frozen=True)
class Batch:
    """A noised batch: inputs of the denoiser, their ``target``, and the timesteps ``t`` that weight the loss.

    ``times``: the timesteps in the scheduler's units. ``regions``: loss weights per latent pixel.
    """

    target: Tensor
    t: Tensor
    noisy: Tensor
    times: Tensor
    embeddings: TextEmbeddings
    labels: Tensor | None
    regions: Tensor | None = None


class Batches:
    """The batches of a run: each depends only on seed, step and micro-step.

    All processes draw the same global batch, and each takes its own rows of it. ``process``: the index of this one.
    ``seed``: another one than the run's, for batches that are not those of its steps.
    """

    def __init__(self, data: RunData, embeddings: PromptEmbeddings, process: int = 0, seed: int | None = None) -> None:
        self.data, self.embeddings, self.process = data, embeddings, process
        self.plan, self.config, self.device = data.plan, data.plan.config, data.plan.device
        self.seed = self.config.seed if seed is None else seed

    def loss(self, step: int, micro: int = 0) -> Tensor:
        """The loss of one micro-step."""
        return self.loss_of(self.draw(step, micro))

    def loss_of(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        with self.autocast():
            prediction = predict(self.plan.pipe, batch.noisy, batch.times, batch.embeddings, batch.labels)
        return self.mean_loss(batch, prediction)

    def draw(self, step: int, micro: int) -> Batch:
        """Draw the batch of a micro-step."""
        data, config = self.data, self.config
        # The last 0 is the rank: every process draws the same as rank 0.
        source = generator(self.seed, "step", step, micro, 0)
        # Dropout draws from the global generator, so that is seeded per step as well. Dropout masks differ between
        # processes; a sampled rank (DyLoRA) does not.
        rank = self.process if config.dropout > 0 else 0
        torch.manual_seed(derive(self.seed, "dropout", step, micro, rank))
        size = config.train_batch_size * self.plan.processes
        number = step * config.gradient_accumulation_steps + micro
        images = self._images(number, size)
        views = data.latents.pick(images, source)
        latents, regions = data.latents.draw(views, source), data.latents.weights(views)
        prompts = self.plan.captions.draw(images, generator(self.seed, "captions", step, micro, 0))
        if data.class_latents is not None:
            count = len(data.class_latents.views_of_image)
            classes = shuffled_indices(self.seed, "class pictures", count, number * size, size)
            views = data.class_latents.pick(classes, source, data.latents.size_of(images[0]))
            latents = torch.cat([latents, data.class_latents.draw(views, source)])
            regions = None if regions is None else torch.cat([regions, torch.ones_like(regions)])
            prompts += [self.plan.subject.class_prompt] * size
        elif config.with_prior_preservation:  # prior_preservation=frozen: the same images with their class prompts
            latents = torch.cat([latents, latents])
            regions = None if regions is None else torch.cat([regions, torch.ones_like(regions)])
            prompts += [self.plan.subject.class_prompts[image] for image in images]
        return self._noised(latents, prompts, source, regions)

    def _images(self, number: int, size: int) -> list[int]:
        """Indices of the images in batch ``number``."""
        subject, seed = self.plan.subject, self.seed
        sizes = [self.data.latents.size_of(image) for image in range(len(subject.images))]
        if subject.members and len(set(sizes)) > 1:
            return owned_indices(seed, "photos", subject.owners, sizes, number, size)
        if subject.members:
            return balanced_indices(seed, "photos", subject.owners, number * size, size)
        return batch_indices(seed, "photos", sizes, number, size)

    def _noised(self, latents: Tensor, prompts: list[str], source: torch.Generator, regions: Tensor | None) -> Batch:
        config, plan, objective = self.config, self.plan, self.plan.objective
        noise, added = draw_noise(latents.shape, config, source)
        t = draw_timesteps(len(latents), plan.timesteps, config.timestep_sampling, source)
        rows = self._own_rows(len(latents))
        latents, noise, added, t = (value[rows].to(self.device) for value in (latents, noise, added, t))
        prompts, regions = [prompts[row] for row in rows], None if regions is None else regions[rows]
        noisy, target = objective.add_noise(latents, added, t), objective.target(latents, noise, t)
        labels = t if config.class_labels_conditioning == "timesteps" else None
        with self.autocast():
            embeddings = self.embeddings(prompts)
        regions = None if regions is None else regions.to(self.device)
        batch = Batch(target, t, noisy.to(plan.dtype), objective.times[t], embeddings, labels, regions)
        uses_base = config.with_prior_preservation and self.data.class_latents is None
        return self._with_base_targets(batch, prompts) if uses_base else batch

    def _own_rows(self, rows: int) -> list[int]:
        """This process's rows of a global batch: its images, and their class rows in the second half."""
        size = self.config.train_batch_size
        first = size * self.process
        return [row for row in range(rows) if first <= row % (size * self.plan.processes) < first + size]

    @torch.no_grad()
    def _with_base_targets(self, batch: Batch, prompts: list[str]) -> Batch:
        """Replace the targets of the second half with the predictions of the base without adapters."""
        half = len(prompts) // 2
        labels = None if batch.labels is None else batch.labels[half:]
        with without_adapters(components(self.plan.pipe)), self.autocast():
            embeddings = self.embeddings(prompts[half:])
            prediction = predict(self.plan.pipe, batch.noisy[half:], batch.times[half:], embeddings, labels)
        if prediction.shape[1] == 2 * batch.target.shape[1]:
            prediction = prediction.chunk(2, dim=1)[0]
        return replace(batch, target=torch.cat([batch.target[:half], prediction.to(batch.target.dtype)]))

    def mean_loss(self, batch: Batch, prediction: Tensor) -> Tensor:
        """Mean loss of the images plus ``prior_loss_weight`` times the mean loss of the class rows."""
        config = self.config
        losses = self.plan.objective.losses(prediction, batch.target, batch.t, batch.regions)
        size = config.train_batch_size
        mean = losses[:size].mean()
        return mean + config.prior_loss_weight * losses[size:].mean() if len(losses) > size else mean

    def autocast(self) -> torch.autocast:
        """Autocast to the run's dtype if that is fp16 or bf16; else a context that does nothing."""
        return lowered(self.plan.dtype, self.device)
