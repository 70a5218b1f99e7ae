"""Builds a run: text embeddings, precision, adapter, optimizer; then the checkpoint's state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...io.run_layout import CHECKPOINTS
from ...loaders import save_adapter
from ...pipelines.calibration import Calibration
from ..data.latents import Latents
from ..data.prompts import PromptEmbeddings
from ..data.subject import Subject
from ..measuring.validation import Validation
from ..planning.adapter import agree_on_factors, put_in_adapter, put_in_checkpoint
from ..planning.checkpoints import restore_optimizer, write_checkpoint
from ..planning.opening import lower_precision
from ..planning.plan import Plan
from ..settings.resolved import ResolvedConfig
from ..step.averaging import Average
from ..step.optimization import build_optimizer, build_schedule, restore_schedule, schedule_state
from ..step.optimizer_state import state_numbers, state_tensors
from ..step.quantized import quantize_base
from .encoding import RunData

ADAPTER = "subject"
CALIBRATION_IMAGES = 8


@dataclass
class Run:
    """Everything that the training loop needs, ready for step ``first_step``.

    ``adapter`` is the adapter's name in the pipeline. ``last_step`` is lowered when the run stops early.
    """

    data: RunData
    adapter: str
    embeddings: PromptEmbeddings
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Any
    scaler: torch.amp.GradScaler
    average: Average | None
    validation: Validation | None
    first_step: int
    last_step: int

    @property
    def plan(self) -> Plan:
        """What was settled before the run."""
        return self.data.plan

    @property
    def config(self) -> ResolvedConfig:
        """The settings."""
        return self.plan.config

    @property
    def pipe(self) -> Any:
        """The pipeline that holds the adapter."""
        return self.plan.pipe

    @property
    def subject(self) -> Subject:
        """What is learned."""
        return self.plan.subject

    @property
    def latents(self) -> Latents:
        """Latents of the images."""
        return self.data.latents

    @property
    def class_latents(self) -> Latents | None:
        """Latents of the class images."""
        return self.data.class_latents

    @property
    def trained(self) -> int:
        """The number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def info(self) -> dict[str, Any]:
        """What the adapter file says of its subject or subjects."""
        subject = self.subject
        members = [
            {"name": m.name, "trigger": m.trigger, "class_word": m.class_word or "", "prompt": m.captions[0]}
            for m in subject.members
        ]
        return {
            "extra": {"subjects": members} if members else {},
            "trigger": subject.trigger or "",
            "class_word": subject.class_word or "",
            "instance_prompt": subject.subject_prompt,
            "prompts": list(dict.fromkeys(subject.captions)),
            "seed": self.config.seed,
            "license": self.config.license or "",
        }

    def keep_best_step(self) -> int:
        """Put the adapter of the step that validation chose into the pipeline; returns the step that is kept."""
        if self.validation is None:
            return self.last_step
        return self.validation.put_chosen(self.adapter, self.last_step)


def build_run(data: RunData) -> Run:
    """Encode the prompts, lower the base's precision, put the adapter in, quantize the base."""
    plan = data.plan
    embeddings = None if plan.config.encodes_each_step else data.embeddings()
    prepare_base(plan)
    run = put_in(data, embeddings)
    quantize_base(plan.config, plan.pipe)
    return run


def prepare_base(plan: Plan) -> None:
    """Cast the frozen base to the run's dtype, and turn gradient checkpointing on if it is asked for."""
    lower_precision(plan.pipe, plan.dtype)
    if plan.config.gradient_checkpointing:
        denoiser, *encoders = plan.components.values()
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        for encoder in encoders:
            encoder.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]


def put_in(data: RunData, embeddings: PromptEmbeddings | None, name: str = ADAPTER) -> Run:
    """A run whose adapter ``name`` is in the pipeline, at the checkpoint's state if there is one.

    ``embeddings`` are made now if they are not given: prompts encoded at each step need the new tokens in place.
    """
    plan = data.plan
    config, pipe, checkpoint = plan.config, plan.pipe, plan.checkpoint
    if checkpoint is None:
        parameters = put_in_adapter(config, pipe, plan.components, name, calibration_of(data), plan.subject.new_tokens)
    else:
        parameters = put_in_checkpoint(pipe, name, checkpoint.path)
    if plan.processes > 1:
        agree_on_factors(pipe, parameters)
    optimizer = build_optimizer(config, parameters, plan.processes)
    average = Average(parameters, config.ema_decay) if config.ema_decay else None
    schedule = build_schedule(config, optimizer)
    scaler = torch.amp.GradScaler(plan.device.type, enabled=config.mixed_precision == "fp16")
    if checkpoint is not None:
        tensors = restore_optimizer(optimizer, parameters, checkpoint)
        if average is not None:
            average.restore(tensors)
        restore_schedule(schedule, optimizer, checkpoint.schedule)
        if checkpoint.scaler:
            scaler.load_state_dict(checkpoint.scaler)
    for module in plan.components.values():
        module.train()
    first_step = checkpoint.step if checkpoint else 0
    return Run(
        data,
        name,
        embeddings or data.embeddings(),
        parameters,
        optimizer,
        schedule,
        scaler,
        average,
        validation_of(plan, first_step),
        first_step,
        last_step=config.max_train_steps,
    )


def calibration_of(data: RunData) -> Calibration | None:
    """What calibrates the basis: generic prompts (``None``), given ones, or the first images of the subject."""
    config = data.plan.config
    if config.calibration == "subject":
        indices, latents = data.latents.first_images(CALIBRATION_IMAGES)
        return Calibration([data.plan.subject.captions[index] for index in indices], latents)
    return Calibration(config.calibration_prompts) if config.calibration_prompts else None


def save_checkpoint(run: Run, done: int) -> Path:
    """Write the checkpoint of step ``done`` into the run's folder. Raises :class:`UserError` as a disk fails."""
    average = {} if run.average is None else run.average.tensors()
    return write_checkpoint(
        run.plan.folder / CHECKPOINTS,
        done,
        lambda folder: save_adapter(run.pipe, folder, run.adapter, info={**run.info, "step": done}),
        {**state_tensors(run.optimizer, run.parameters), **average},
        {
            "identity": run.data.identity,
            "schedule": schedule_state(run.schedule),
            "scaler": run.scaler.state_dict(),
            "optimizer": state_numbers(run.optimizer, run.parameters),
        },
    )


def validation_of(plan: Plan, first_step: int) -> Validation | None:
    """What measures the run, with what was measured before ``first_step``; ``None`` if nothing asks for it."""
    if plan.measure is None:
        return None
    validation = Validation(plan.measure, plan.config, plan.pipe, plan.dtype)
    validation.restore(first_step)
    return validation
