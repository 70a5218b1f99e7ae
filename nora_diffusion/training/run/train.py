"""Train one run: plan, encode, build, step, save."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ...errors import UserError, out_of_memory
from ...pipelines.components import denoiser
from ..data.joint import read_data
from ..data.subject import Subject
from ..planning.plan import plan_on, plan_run
from ..planning.preflight import Finding, preflight, report
from ..planning.rundir import RunFolder
from ..settings.checks import check_config
from ..settings.config import TrainConfig
from ..settings.defaults import with_defaults
from ..signals import Interrupted, StopRequests
from ..step.denoiser import check_pipeline
from ..step.randomness import forked
from .encoding import encode
from .launch import build_accelerator
from .outcome import Outcome
from .run import Run, build_run
from .saving import save_outcome
from .steps import Stepper

log = logging.getLogger(__name__)

OUT_OF_MEMORY = (
    "out of memory: lower --train_batch_size or --resolution, or use --gradient_checkpointing and "
    "--mixed_precision bf16; checkpoints in {folder} are kept"
)


@dataclass(frozen=True)
class TrainResult:
    """A finished run. ``final_loss``: mean over the last 20 steps. ``seconds``: time in training steps only."""

    adapter_path: Path
    steps: int
    seconds: float
    final_loss: float
    trainable_parameters: int


def train(config: TrainConfig) -> TrainResult:
    """Train an adapter as ``config`` says; return its path and statistics.

    Raises :class:`UserError` for a user's mistake, :class:`.signals.Interrupted` after SIGINT or SIGTERM.
    """
    if config.preflight_only:
        raise UserError("preflight_only does not train: call nora_diffusion.training.check, or leave it out")
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
                raise UserError("another process of this run has stopped: its message gives the reason") from error
            raise


def prepared(config: TrainConfig) -> tuple[Subject, TrainConfig]:
    """Check the settings, read the subject and fill in defaults. Raises :class:`UserError`."""
    check_config(config)
    return read_data(config), with_defaults(config)


def _is_lost_connection(error: Exception) -> bool:
    """Whether another process stopped. gloo raises no error class of its own, so its message is checked."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()


def run_folder(config: TrainConfig, accelerator: Accelerator) -> RunFolder:
    """The run folder at ``output_dir``; only rank 0 owns it."""
    return RunFolder(config.folder, accelerator.is_main_process, config.overwrite_output_dir)


def check(config: TrainConfig) -> list[Finding]:
    """Run the preflight checks without training; nothing is written. Raises :class:`UserError` like ``train``."""
    subject, config = prepared(config)
    accelerator = build_accelerator(config)
    with run_folder(config, accelerator) as folder, StopRequests() as stop:
        return preflight(plan_run(config, subject, accelerator, folder, stop))


def check_on(config: TrainConfig, pipe: Any, device: str | torch.device | None = None) -> list[Finding]:
    """Run the preflight checks for a new run on an open base, which is not changed.

    ``device``: the device of the run; default: that of the base.
    """
    subject, config = prepared(config)
    check_pipeline(config, pipe)
    return preflight(plan_on(config, subject, pipe, torch.device(device) if device else denoiser(pipe).device))


def set_up(
    config: TrainConfig, subject: Subject, accelerator: Accelerator, folder: RunFolder, stop: StopRequests
) -> Run:
    """Prepare a run; the folder is untouched until all checks pass."""
    plan = plan_run(config, subject, accelerator, folder, stop)
    if folder.owner:
        report(preflight(plan), config.strict)
    return build_run(encode(plan, accelerator, folder, stop))


def conclude(run: Run, stepper: Stepper, folder: RunFolder) -> TrainResult:
    """Save the adapter, its model card and its report; export and upload if set."""
    steps = folder.steps()  # including those before a resume, so that a resumed run ends like an uninterrupted one
    recent, seconds = [loss for _, loss, _ in steps[-20:]], sum(row[2] for row in steps)
    final_loss = sum(recent) / len(recent) if recent else float("nan")
    if folder.owner:
        folder.state("saving")
        save_outcome(Outcome(run, folder, run.load_best_step(), final_loss, seconds))
    stepper.end()
    folder.state("done", step=run.last_step, loss=final_loss)
    return TrainResult(folder.adapter, run.last_step, seconds, final_loss, run.trained)
