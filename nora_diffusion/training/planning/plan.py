"""The plan of a run: everything that is settled before its first step, in one object."""

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
from ...pipelines.precision import MIXED_DTYPES
from ..data.dataset import caption_variants
from ..data.subject import Subject
from ..data.tokens import check_new_tokens
from ..measuring.validation import Measure, plan_measure
from ..settings.config import TrainConfig
from ..settings.resolved import ResolvedConfig, resolved
from ..signals import StopRequests
from ..step.denoiser import check_pipeline, denoiser, native_resolution
from ..step.objective import Objective, is_flow
from .adapter import adapted_components, adapter_config, check_targets
from .checkpoints import Checkpoint, check_identity, find_checkpoint, recover
from .identity import identity_of
from .opening import launched_precision, open_base, opening_dtype
from .rundir import RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A run that is settled and has not begun. Nothing in it is open: later code reads it as it is.

    ``components``: the modules that get the adapter by name, the denoiser first. ``levels``: the timesteps that are
    trained. ``device``: where the run will be.
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
        """A new config of the adapter."""
        return adapter_config(self.config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen denoiser and text encoders."""
        return MIXED_DTYPES[self.config.mixed_precision]

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """All settings by key as they are in force, with the words that were found in the data; no secrets."""
        return {**self.config.to_dict(), **self.subject.settings}

    @functools.cached_property
    def captions(self) -> CaptionVariants:
        """The captions that each image may be drawn with."""
        return caption_variants(self.config, self.subject.captions)

    @property
    def prompts(self) -> list[str]:
        """Every prompt of the run: captions and, under prior preservation, class prompts."""
        prior = self.subject.class_prompts
        shared = [self.subject.class_prompt] if prior and self.subject.class_prompt else []
        return [*self.captions.all(), *prior, *shared]

    @property
    def levels(self) -> range:
        """The timesteps that are trained."""
        return trained_levels(self.config, self.objective)

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
        """What must be equal for a resumed run to be the same run. ``class_hash``: of the class images."""
        return identity_of(self.settings, self.pipe, self.subject, class_hash, self.processes)


def plan_run(
    config: TrainConfig,
    subject: Subject,
    accelerator: Accelerator,
    folder: RunFolder,
    stop: StopRequests,
    pipe: Any = None,
) -> Plan:
    """Plan a run in ``folder``, on ``pipe`` or on the base that ``config`` names; nothing in the folder changes.

    Raises :class:`UserError` for what cannot be done, before anything is written.
    """
    device = accelerator.device
    if folder.owner:
        recover(folder.checkpoints)
    accelerator.wait_for_everyone()
    checkpoint = wanted_checkpoint(config, folder)
    if pipe is None:
        pipe = open_base(config, device, opening_dtype([config], device))
    else:
        check_pipeline(config, pipe)
    plan = plan_on(config, subject, pipe, device, checkpoint, accelerator)
    stop.check()
    if checkpoint is not None:
        # The class images are compared later, once they are there.
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
    """Plan a run on an open base."""
    processes = 1 if accelerator is None else accelerator.num_processes
    config = settle(config, pipe, checkpoint, len(subject.images), device, processes)
    if accelerator is not None and processes > 1:
        config = agree_on_seed(config)
    objective = objective_of(config, pipe)
    trained_levels(config, objective)
    components = adapted_components(config, pipe)
    check_targets(config, pipe, components)
    check_new_tokens(config, pipe, list(subject.new_tokens), subject.captions)
    measure = plan_measure(config, subject, device)
    return Plan(config, pipe, subject, components, objective, device, processes, checkpoint, measure)


def settle(
    config: TrainConfig,
    pipe: Any,
    checkpoint: Checkpoint | None,
    images: int,
    device: torch.device,
    processes: int,
) -> ResolvedConfig:
    """Fill in what depends on base, machine, data or checkpoint. A run with the resolved config repeats this one."""
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


def agree_on_seed(config: ResolvedConfig) -> ResolvedConfig:
    """The first process's seed for all processes: each may have drawn its own."""
    from accelerate.utils import broadcast_object_list

    return replace(config, seed=broadcast_object_list([config.seed])[0])


def objective_of(config: ResolvedConfig, pipe: Any) -> Objective:
    """The objective that the base's scheduler was trained for, with the config's weights and loss."""
    return Objective.of(
        pipe.scheduler, config.snr_gamma, denoiser(pipe).device,
        loss=config.loss_type, huber_c=config.huber_c, weighting=config.loss_weighting,
    )  # fmt: skip


def trained_levels(config: ResolvedConfig, objective: Objective) -> range:
    """The timesteps that are trained. Raises :class:`UserError` for a range that the scheduler does not have."""
    for name in ("min_timestep", "max_timestep"):
        value, most = getattr(config, name), objective.timesteps
        if value is not None and value > most - (name == "min_timestep"):
            raise UserError(f"{name}={value} is beyond the {most} timesteps of this base")
    end = objective.timesteps if config.max_timestep is None else config.max_timestep
    return range(config.min_timestep, end)


def wanted_checkpoint(config: TrainConfig, folder: RunFolder) -> Checkpoint | None:
    """The checkpoint to resume from, read and checked. Raises :class:`UserError` if an earlier run is in the way."""
    if config.resume_from_checkpoint:
        found = find_checkpoint(folder.checkpoints, config.resume_from_checkpoint)
        if found is not None:
            return found
        log.warning("there is no checkpoint in %s yet: training starts from the beginning", folder.checkpoints)
    if folder.owner and folder.holds_a_run() and not config.overwrite_output_dir:
        raise UserError(
            f"{folder.path} holds an earlier run: go on with --resume_from_checkpoint latest, replace it with "
            "--overwrite_output_dir, or choose another --output_dir"
        )
    return None
