"""The plan of a run: everything that is known before its first step, in one object."""

from __future__ import annotations

import functools
import logging
import math
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ...adapters import AdapterConfig
from ...data.caption_variants import CaptionVariants
from ...errors import UserError
from ...pipelines.components import denoiser
from ...pipelines.precision import MIXED_DTYPES
from ..data.captions import caption_variants
from ..data.class_images import ClassImages, read_class_images
from ..data.subject import Subject
from ..data.tokens import check_new_tokens
from ..measuring.validation import Measure, plan_measure
from ..settings.config import TrainConfig
from ..settings.resolved import ResolvedConfig, resolved
from ..signals import StopRequests
from ..step.denoiser import check_pipeline, native_resolution
from ..step.objective import Objective, is_flow
from .adapter import adapted_components, check_targets, starting_adapter
from .checkpoints import Checkpoint, check_identity, find_checkpoint, recover
from .identity import identity_of
from .opening import launched_precision, open_base, opening_dtype
from .rundir import RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A checked run that has not started; every setting has its final value.

    ``components``: adapted modules by name, the denoiser first. ``device``: the device of the run.
    """

    config: ResolvedConfig
    pipe: Any
    subject: Subject
    components: dict[str, nn.Module]
    objective: Objective
    device: torch.device
    processes: int = 1
    checkpoint: Checkpoint | None = None
    measure: Measure | None = None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.config.folder

    @property
    def adapter(self) -> AdapterConfig:
        """The config of the adapter as it starts; a new object at each access."""
        return starting_adapter(self.config, self.components)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen denoiser and text encoders."""
        return MIXED_DTYPES[self.config.mixed_precision]

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """All settings by key with their final values, including words found in the data; without secrets."""
        return {**self.config.to_dict(), **self.subject.settings}

    @functools.cached_property
    def captions(self) -> CaptionVariants:
        """The captions that may be drawn for each image."""
        return caption_variants(self.config, self.subject.captions)

    @functools.cached_property
    def class_images(self) -> ClassImages:
        """The class images that exist before the run."""
        return read_class_images(self.config)

    @property
    def prompts(self) -> list[str]:
        """Every prompt of the run: captions and, under prior preservation, class prompts."""
        prior = self.subject.class_prompts
        shared = [self.subject.class_prompt] if prior and self.subject.class_prompt else []
        held_out = [] if self.measure is None else self.measure.captions
        return [*self.captions.all(), *prior, *shared, *held_out]

    @property
    def timesteps(self) -> range:
        """The timesteps that are trained."""
        return trained_timesteps(self.config, self.objective)

    @property
    def images_per_step(self) -> int:
        """Images of the subject in one optimizer step."""
        return self.config.images_per_step(self.processes)

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps in one pass over the images."""
        return epoch_steps(len(self.subject.images), self.images_per_step)

    @property
    def sample_interval(self) -> int:
        """Steps between samples and measurements."""
        steps = self.config.validation_steps
        return self.config.validation_epochs * self.epoch_steps if steps is None else steps

    def identity(self, class_hash: str) -> dict[str, Any]:
        """What must be equal when the run resumes. ``class_hash``: hash of the class images."""
        return identity_of(self.settings, self.pipe, self.subject, class_hash, self.processes)


def plan_run(
    config: TrainConfig,
    subject: Subject,
    accelerator: Accelerator,
    folder: RunFolder,
    stop: StopRequests,
    pipe: Any = None,
) -> Plan:
    """Plan a run in ``folder`` on ``pipe``, or on the base in ``config`` if that is ``None``.

    Raises :class:`UserError` if the run is not possible. Nothing is written.
    """
    device = accelerator.device
    if folder.owner:
        recover(folder.checkpoints)
    accelerator.wait_for_everyone()
    checkpoint = checkpoint_to_resume(config, folder)
    if pipe is None:
        pipe = open_base(config, device, opening_dtype([config], device))
    else:
        check_pipeline(config, pipe)
    plan = plan_on(config, subject, pipe, device, checkpoint, accelerator)
    stop.check()
    if checkpoint is not None:
        # The hash of the class images is compared later, after they have been generated.
        check_identity(checkpoint, plan.identity(str(checkpoint.identity.get("class pictures", ""))))
    return plan


def plan_on(
    config: TrainConfig,
    subject: Subject,
    pipe: Any,
    device: torch.device,
    checkpoint: Checkpoint | None = None,
    accelerator: Accelerator | None = None,
) -> Plan:
    """Plan a run on an open base. Raises :class:`UserError` if the run is not possible."""
    processes = 1 if accelerator is None else accelerator.num_processes
    config = resolve_settings(config, pipe, checkpoint, len(subject.images), device, processes)
    if accelerator is not None and processes > 1:
        config = broadcast_seed(config)
    objective = objective_of(config, pipe)
    trained_timesteps(config, objective)
    components = adapted_components(config, pipe)
    check_targets(config, pipe, components)
    check_new_tokens(config, pipe, list(subject.new_tokens), subject.captions)
    measure = plan_measure(config, subject, device)
    return Plan(config, pipe, subject, components, objective, device, processes, checkpoint, measure)


def resolve_settings(
    config: TrainConfig,
    pipe: Any,
    checkpoint: Checkpoint | None,
    images: int,
    device: torch.device,
    processes: int,
) -> ResolvedConfig:
    """Fill in settings that depend on base, machine, data or checkpoint. The result as config repeats the run."""
    earlier = checkpoint.identity if checkpoint else {}
    precision = config.mixed_precision or earlier.get("mixed_precision") or launched_precision(device)
    steps = config.max_train_steps
    if steps is None:
        assert config.num_train_epochs is not None and config.train_batch_size is not None
        batch = config.train_batch_size * config.gradient_accumulation_steps * processes
        steps = config.num_train_epochs * epoch_steps(images, batch)
    warmup = config.lr_warmup_steps
    if warmup is None:
        warmup = earlier.get("lr_warmup_steps", 0 if config.lr_scheduler == "constant" else steps // 10)
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU: use bf16 or no")
    if warmup >= steps and config.lr_scheduler != "constant":
        log.warning("%d warm-up steps in a run of %d: the learning rate never reaches its full value", warmup, steps)
    return resolved(
        config,
        seed=config.seed if config.seed is not None else earlier.get("seed", secrets.randbelow(2**31)),
        mixed_precision=precision,
        max_train_steps=steps,
        lr_warmup_steps=warmup,
        timestep_sampling=config.timestep_sampling or ("logit_normal" if is_flow(pipe.scheduler) else "uniform"),
        resolution=config.resolution or native_resolution(pipe),
    )


def epoch_steps(images: int, images_per_step: int) -> int:
    """Optimizer steps in one pass over the images."""
    return max(1, math.ceil(images / images_per_step))


def broadcast_seed(config: ResolvedConfig) -> ResolvedConfig:
    """Use the seed of rank 0 on all processes: each may have drawn its own."""
    from accelerate.utils import broadcast_object_list

    return replace(config, seed=broadcast_object_list([config.seed])[0])


def objective_of(config: ResolvedConfig, pipe: Any) -> Objective:
    """The training objective: prediction type and noise of the base's scheduler, loss and weights of the config."""
    return Objective.of(
        pipe.scheduler, config.snr_gamma, denoiser(pipe).device,
        loss=config.loss_type, huber_c=config.huber_c, weighting=config.loss_weighting,
    )  # fmt: skip


def trained_timesteps(config: ResolvedConfig, objective: Objective) -> range:
    """The timesteps that are trained. Raises :class:`UserError` for a range outside those of the scheduler."""
    for name in ("min_timestep", "max_timestep"):
        value, count = getattr(config, name), objective.timesteps
        if value is not None and value > count - (name == "min_timestep"):
            raise UserError(f"{name}={value} is beyond the {count} timesteps of this base: choose a smaller one")
    end = objective.timesteps if config.max_timestep is None else config.max_timestep
    return range(config.min_timestep, end)


def checkpoint_to_resume(config: TrainConfig, folder: RunFolder) -> Checkpoint | None:
    """Read and check the checkpoint to resume from. Raises :class:`UserError` if the folder holds another run."""
    if config.resume_from_checkpoint:
        found = find_checkpoint(folder.checkpoints, config.resume_from_checkpoint)
        if found is not None:
            return found
        log.warning("no checkpoint in %s: training starts from the beginning", folder.checkpoints)
    if folder.owner and folder.holds_a_run() and not config.overwrite_output_dir:
        raise UserError(
            f"{folder.path} holds an earlier run: continue it with --resume_from_checkpoint latest, replace it with "
            "--overwrite_output_dir, or choose another --output_dir"
        )
    return None
