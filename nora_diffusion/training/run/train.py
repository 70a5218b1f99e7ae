"""Training: set up, train, clean up."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from ...errors import UserError, out_of_memory
from ..data.joint import read_data
from ..data.subject import Subject
from ..data.tokens import check_new_tokens
from ..measuring.validation import Validation, plan_measure
from ..settings.checks import check_config
from ..settings.config import TrainConfig
from ..settings.defaults import with_defaults
from ..step.denoiser import check_pipeline, denoiser
from ..step.randomness import forked
from .checkpoints import Checkpoint, check_identity, find_checkpoint, prune, recover
from .identity import identity_of
from .preflight import Finding, Plan, preflight, report
from .rundir import RunFolder
from .setup import (
    Material,
    Run,
    build_latents,
    build_run,
    check_targets,
    objective_of,
    open_base,
    opening_dtype,
    settle,
)
from .signals import Interrupted, StopRequests
from .steps import Stepper

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """A finished run. ``final_loss`` is the mean over the last steps; ``seconds`` counts the steps alone."""

    adapter_path: Path
    steps: int
    seconds: float
    final_loss: float
    trainable_parameters: int


def train(config: TrainConfig) -> TrainResult:
    """Train an adapter as ``config`` says; returns where it is.

    Raises :class:`UserError` for a user's mistake, :class:`.signals.Interrupted` after SIGINT or SIGTERM.
    """
    if config.preflight_only:
        raise UserError("preflight_only trains nothing: call nora_diffusion.training.check, or leave it out")
    subject, config = prepared(config)
    accelerator = build_accelerator(config)
    with run_folder(config, accelerator) as folder, StopRequests() as stop:
        try:
            with forked(accelerator.device):
                run = set_up(config, subject, accelerator, folder, stop)
                stepper = Stepper(run, accelerator, folder, stop)
                stepper.run_steps()
                return conclude(run, stepper, folder)
        except Interrupted as interrupted:
            folder.state("interrupted", message=str(interrupted))
            raise
        except Exception as error:
            if out_of_memory(error):
                folder.state("failed", message="out of memory")
                raise UserError(OUT_OF_MEMORY.format(folder=folder.checkpoints)) from error
            folder.state("failed", message=str(error))
            if accelerator.num_processes > 1 and _is_lost_connection(error):
                raise UserError("another process of this run has stopped; what it said is the reason") from error
            raise


def prepared(config: TrainConfig) -> tuple[Subject, TrainConfig]:
    """What a run learns, and its settings, checked, with prompts and defaults filled in. Raises :class:`UserError`."""
    check_config(config)
    subject, config = read_data(config)
    return subject, with_defaults(config)


def _is_lost_connection(error: Exception) -> bool:
    """Whether a process found that another one is gone; gloo says so in words only."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()


OUT_OF_MEMORY = (
    "out of memory: lower --train_batch_size or --resolution, or use --gradient_checkpointing and "
    "--mixed_precision bf16; checkpoints in {folder} are kept"
)


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Device and processes. Precision, checkpoints and trackers are handled here, not by accelerate."""
    if config.local_rank != -1 and "LOCAL_RANK" not in os.environ:
        raise UserError("--local_rank is set by the launcher: start with `accelerate launch` and leave it out")
    # Without a device accelerate takes launched processes for strangers, unless it is told of the CPU.
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    # The others wait while the first process draws class pictures or measures, for longer than NCCL's ten minutes;
    # where one process ends, the launcher ends the others.
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))
    return Accelerator(cpu=launched and not torch.accelerator.is_available(), kwargs_handlers=[patient])


def run_folder(config: TrainConfig, accelerator: Accelerator) -> RunFolder:
    """The folder that ``config`` names."""
    return RunFolder(config.folder, accelerator.is_main_process, config.overwrite_output_dir)


def check(config: TrainConfig) -> list[Finding]:
    """What speaks against a run, without training; nothing is written. Raises :class:`UserError` as ``train`` would."""
    subject, config = prepared(config)
    accelerator = build_accelerator(config)
    with run_folder(config, accelerator) as folder, StopRequests() as stop:
        return preflight(plan_run(config, subject, accelerator, folder, stop))


def check_on(config: TrainConfig, pipe: Any, device: str | torch.device | None = None) -> list[Finding]:
    """The same for a new run on a base that is open already, which stays as it is.

    ``device`` is where the run will be, if the base is not there now.
    """
    subject, config = prepared(config)
    check_pipeline(config, pipe)
    objective_of(config, pipe)
    place = torch.device(device) if device else denoiser(pipe).device
    config = settle(config, pipe, None, len(subject.photos), place, processes=1)
    check_targets(config, pipe)
    check_new_tokens(config, pipe, list(subject.new_tokens), subject.captions)
    measure = plan_measure(config, subject, place)
    return preflight(Plan(config, pipe, subject, config.folder, device=place, measure=measure))


def plan_run(
    config: TrainConfig,
    subject: Subject,
    accelerator: Accelerator,
    folder: RunFolder,
    stop: StopRequests,
    pipe: Any = None,
) -> Plan:
    """Open the base, unless it is given, and settle the run; nothing in the folder changes."""
    processes = accelerator.num_processes
    if folder.owner:
        recover(folder.checkpoints)
    accelerator.wait_for_everyone()
    checkpoint = wanted_checkpoint(config, folder)
    pipe = pipe or open_base(config, accelerator.device, opening_dtype([config], accelerator.device))
    config = settle(config, pipe, checkpoint, len(subject.photos), accelerator.device, processes)
    config = agree_on_seed(config, accelerator)
    stop.check()
    if checkpoint is not None:
        # The class pictures are compared below, once they are there.
        pictures = str(checkpoint.identity.get("class pictures", ""))
        check_identity(checkpoint, identity_of(config, pipe, subject, pictures, processes))
    check_targets(config, pipe)
    check_new_tokens(config, pipe, list(subject.new_tokens), subject.captions)
    measure = plan_measure(config, subject, accelerator.device)
    return Plan(config, pipe, subject, folder.path, checkpoint=checkpoint, processes=processes, measure=measure)


def set_up(
    config: TrainConfig, subject: Subject, accelerator: Accelerator, folder: RunFolder, stop: StopRequests
) -> Run:
    """All before the first step; nothing in the folder changes until what can be refused has been."""
    plan = plan_run(config, subject, accelerator, folder, stop)
    if folder.owner:
        report(preflight(plan), config.strict)
    run = build_run(gather(plan, accelerator, folder, stop))
    run.validation = validation_of(plan, run)
    return run


def validation_of(plan: Plan, run: Run) -> Validation | None:
    """What measures the run on the way, with what it measured before the checkpoint; ``None`` if nothing is asked."""
    if plan.measure is None:
        return None
    validation = Validation(plan.measure, run.config, run.pipe, plan.place, run.dtype)
    validation.restore(run.first_step)
    return validation


def gather(plan: Plan, accelerator: Accelerator, folder: RunFolder, stop: StopRequests) -> Material:
    """Claim the folder and encode the data of a run that nothing speaks against."""
    config, pipe, subject = plan.config, plan.pipe, plan.subject
    checkpoint, processes = plan.checkpoint, plan.processes
    stop.check()
    trigger = config.trigger if subject.says_trigger else None  # a given one would be put into captions without it
    again = replace(config, trigger=trigger, resume_from_checkpoint=None, overwrite_output_dir=False)
    folder.claim(anew=checkpoint is None, config=again.to_dict())
    folder.state("starting", total=config.max_train_steps, step=checkpoint.step if checkpoint else 0)
    data = build_latents(config, pipe, subject, folder, accelerator.wait_for_everyone, stop.check)
    identity = identity_of(config, pipe, subject, data[2], processes)
    if checkpoint is not None:
        check_identity(checkpoint, identity)
    stop.check()
    log.info("%d photos, trigger %r, class %r", len(subject.photos), subject.trigger, subject.class_word)
    return Material(config, pipe, subject, data[0], data[1], identity, checkpoint, processes)


def wanted_checkpoint(config: TrainConfig, folder: RunFolder) -> Checkpoint | None:
    """The checkpoint to go on from, read and checked. Refuses to overwrite an earlier run unasked."""
    if config.resume_from_checkpoint:
        found = find_checkpoint(folder.checkpoints, config.resume_from_checkpoint)
        if found is not None:
            return found
        log.warning("there is no checkpoint in %s yet: training starts anew", folder.checkpoints)
    if folder.owner and folder.holds_a_run() and not config.overwrite_output_dir:
        raise UserError(
            f"{folder.path} holds an earlier run: go on with --resume_from_checkpoint latest, replace it with "
            "--overwrite_output_dir, or choose another --output_dir"
        )
    return None


def agree_on_seed(config: TrainConfig, accelerator: Accelerator) -> TrainConfig:
    """The first process's seed for all: each may have drawn its own."""
    if accelerator.num_processes == 1:
        return config
    from accelerate.utils import broadcast_object_list

    return replace(config, seed=broadcast_object_list([config.seed])[0])


def conclude(run: Run, stepper: Stepper, folder: RunFolder) -> TrainResult:
    """Write the adapter, its card and, where asked, the upload."""
    from .outcome import write_adapter_and_card
    from .report import write_report

    steps = folder.steps()  # of earlier starts too: a resumed run ends as one that was never stopped
    recent, seconds = [loss for _, loss, _ in steps[-20:]], sum(row[2] for row in steps)
    final_loss = sum(recent) / len(recent) if recent else float("nan")
    path = folder.adapter
    if folder.owner:
        folder.state("saving")
        if run.validation is not None:
            run.kept_step = run.validation.put_chosen(run.adapter, run.total_steps)
        path = write_adapter_and_card(run, folder, final_loss, seconds)
        prune(folder.checkpoints, run.config.checkpoints_total_limit)
        write_report(run, folder, final_loss)
    stepper.end_trackers()
    folder.state("done", step=run.total_steps, loss=final_loss)
    return TrainResult(path, run.total_steps, seconds, final_loss, run.trained)
