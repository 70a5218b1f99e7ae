"""Build a run: text embeddings, precision, adapter, optimizer, and the state of its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...formats.adapter_file import inspect_adapter
from ...io.run_layout import CHECKPOINTS
from ...loaders import save_adapter
from ...pipelines.calibration import Calibration
from ...pipelines.components import components, nora_layers
from ..data.dataset import transform_of
from ..data.latents import Latents
from ..data.prompts import PromptEmbeddings
from ..data.subject import Subject
from ..hooks.step_hook import Hooks
from ..hooks.trained import Trained
from ..measuring.heldout_loss import HeldOutLoss
from ..measuring.validation import Validation
from ..planning.adapter import add_new_adapter, add_start_adapter, broadcast_factors, load_checkpoint_adapter
from ..planning.checkpoints import restore_optimizer, write_checkpoint
from ..planning.opening import lower_precision
from ..planning.plan import Plan
from ..settings.resolved import ResolvedConfig
from ..step.averaging import Average
from ..step.denoiser import bucket_multiple
from ..step.optimization import build_optimizer, build_schedule, restore_schedule, schedule_state
from ..step.optimizer_state import state_numbers, state_tensors
from ..step.quantized import quantize_base
from ..step.seeds import derive
from .allocating import with_measured_ranks
from .batches import Batches
from .encoding import RunData
from .hooks import hooks_of

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
    hooks: Hooks
    validation: Validation | None
    first_step: int
    last_step: int

    @property
    def plan(self) -> Plan:
        """The plan of the run."""
        return self.data.plan

    @property
    def config(self) -> ResolvedConfig:
        """The resolved settings."""
        return self.plan.config

    @property
    def pipe(self) -> Any:
        """The pipeline that holds the adapter."""
        return self.plan.pipe

    @property
    def subject(self) -> Subject:
        """The subject that is trained."""
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
        """Metadata of the adapter file about its subject or subjects."""
        subject = self.subject
        members = [
            {"name": m.name, "trigger": m.trigger, "class_word": m.class_word or "", "prompt": m.captions[0]}
            for m in subject.members
        ]
        words = {
            "trigger": subject.trigger or "",
            "class_word": subject.class_word or "",
            "instance_prompt": subject.subject_prompt,
        }
        extra: dict[str, Any] = {"subjects": members} if members else {}
        if self.config.gates_of is not None:
            earlier = inspect_adapter(self.config.gates_of, hashed=False)
            extra = {**earlier.extra, **extra}
            if "mix" in extra:  # its words are those of several subjects
                words = {name: getattr(earlier, name) for name in words}
        return {
            "extra": extra,
            **words,
            "prompts": list(dict.fromkeys(subject.captions)),
            "seed": self.config.seed,
            "license": self.config.license or "",
        }

    def load_best_step(self) -> int:
        """Load the adapter of the step that validation chose, if there is one; return its step."""
        if self.validation is None:
            return self.last_step
        return self.validation.load_chosen(self.adapter, self.last_step)


def build_run(data: RunData) -> Run:
    """Encode the prompts, cast the base, add the adapter and the optimizer, quantize the base."""
    plan = data.plan
    embeddings = None if plan.config.encodes_each_step else data.embeddings()
    prepare_base(plan)
    run = assemble_run(data, embeddings)
    quantize_base(plan.config, plan.pipe)
    return run


def prepare_base(plan: Plan) -> None:
    """Cast the frozen base to the run's dtype; enable gradient checkpointing if it is set."""
    lower_precision(plan.pipe, plan.dtype)
    if plan.config.gradient_checkpointing:
        denoiser, *encoders = plan.components.values()
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        for encoder in encoders:
            encoder.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]


def assemble_run(data: RunData, embeddings: PromptEmbeddings | None, name: str = ADAPTER) -> Run:
    """Add the adapter ``name`` and build its optimizer; restore the checkpoint if there is one.

    ``embeddings=None``: build them here, since prompts that are encoded at each step need the new tokens.
    """
    plan = data.plan
    config, pipe, checkpoint = plan.config, plan.pipe, plan.checkpoint
    if checkpoint is None and config.start_from is not None:
        parameters = add_start_adapter(config, pipe, plan.components, name)
    elif checkpoint is None:
        parameters = add_new_adapter(config, pipe, plan.components, name, calibration_of(data), plan.subject.new_tokens)
        if config.rank_allocation == "gradient":
            parameters = with_measured_ranks(data, embeddings or data.embeddings(), name, parameters)
    else:
        parameters = load_checkpoint_adapter(pipe, name, checkpoint.path)
    if plan.processes > 1:
        broadcast_factors(pipe, parameters)
    return run_of(data, embeddings or data.embeddings(), parameters, name)


def run_of(data: RunData, embeddings: PromptEmbeddings, parameters: dict[str, nn.Parameter], name: str) -> Run:
    """The run that trains ``parameters``, which are in the pipeline: optimizer, schedule, average, hooks, validation.

    Their state is restored from the checkpoint if there is one.
    """
    plan = data.plan
    config, checkpoint = plan.config, plan.checkpoint
    optimizer = build_optimizer(config, parameters, plan.processes, scales_of(plan, name))
    for module in plan.components.values():
        module.train()
    process = torch.distributed.get_rank() if plan.processes > 1 else 0
    batches = Batches(data, embeddings, process, derive(config.seed, "hooks"))
    hooks = hooks_of(Trained(plan, name, parameters, optimizer, batches.loss))
    if checkpoint is None:
        hooks.start()  # it may change the parameters
    average = Average(parameters, config.ema_decay) if config.ema_decay else None
    schedule = build_schedule(config, optimizer)
    scaler = torch.amp.GradScaler(plan.device.type, enabled=config.mixed_precision == "fp16")
    if checkpoint is not None:
        tensors = restore_optimizer(optimizer, parameters, checkpoint)
        if average is not None:
            average.restore(tensors)
        hooks.load_state(tensors)
        restore_schedule(schedule, optimizer, checkpoint.schedule)
        if checkpoint.scaler:
            scaler.load_state_dict(checkpoint.scaler)
    first_step = checkpoint.step if checkpoint else 0
    return Run(
        data,
        name,
        embeddings,
        parameters,
        optimizer,
        schedule,
        scaler,
        average,
        hooks,
        validation_of(plan, embeddings, first_step),
        first_step,
        last_step=max(config.max_train_steps, first_step),  # a checkpoint may be beyond a lowered max_train_steps
    )


def scales_of(plan: Plan, adapter: str) -> dict[str, float]:
    """The scale ``alpha / r`` of each projection, by ``<component>.<path>``."""
    return {
        f"{name}.{path}": layer.states[adapter].native_scale
        for name, module in components(plan.pipe).items()
        for path, layer in nora_layers(module, adapter).items()
    }


def calibration_of(data: RunData) -> Calibration | None:
    """Calibration data of the basis: generic prompts (``None``), given prompts, or the first images of the subject."""
    config = data.plan.config
    if config.calibration == "subject":
        indices, latents = data.latents.first_images(CALIBRATION_IMAGES)
        return Calibration([data.plan.subject.captions[index] for index in indices], latents)
    return Calibration(config.calibration_prompts) if config.calibration_prompts else None


def save_checkpoint(run: Run, done: int, previous: int, together: Sequence[str]) -> Path:
    """Write the checkpoint of step ``done`` into the run's folder. Raises :class:`UserError` if the disk fails.

    ``previous``, ``together``: see :class:`.checkpoints.Checkpoint`.
    """
    average = {} if run.average is None else run.average.tensors()
    return write_checkpoint(
        run.plan.folder / CHECKPOINTS,
        done,
        lambda folder: save_adapter(run.pipe, folder, run.adapter, info={**run.info, "step": done}),
        {**state_tensors(run.optimizer, run.parameters), **average, **run.hooks.state()},
        {
            "identity": run.data.identity,
            "schedule": schedule_state(run.schedule),
            "scaler": run.scaler.state_dict(),
            "optimizer": state_numbers(run.optimizer, run.parameters),
            "previous": previous,
            "together": list(together),
        },
    )


def validation_of(plan: Plan, embeddings: PromptEmbeddings, first_step: int) -> Validation | None:
    """The validation of a run, with points from before ``first_step``; ``None`` if it is off."""
    measure, config = plan.measure, plan.config
    if measure is None:
        return None
    heldout_loss = None
    if measure.photos:
        heldout_loss = HeldOutLoss(
            plan.pipe, plan.objective, measure.photos, measure.captions,
            transform_of(config, config.resolution, bucket_multiple(plan.pipe)), embeddings, plan.dtype,
            labels=config.class_labels_conditioning == "timesteps",
        )  # fmt: skip
    validation = Validation(measure, config, plan.pipe, plan.dtype, heldout_loss)
    validation.restore(first_step)
    return validation
