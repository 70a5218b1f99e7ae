"""Train several subjects in one run (``--subjects subjects.yaml``), with the same results as separate runs."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ...errors import UserError, explanation, out_of_memory
from ..data.prompts import PromptEmbeddings
from ..data.subject import Subject, read_subject
from ..planning.checkpoints import recover, steps_to_resume
from ..planning.opening import open_base, opening_dtype
from ..planning.plan import Plan, plan_run
from ..planning.preflight import Finding, preflight, report
from ..planning.rundir import RunFolder
from ..run.encoding import RunData, encode
from ..run.launch import build_accelerator
from ..run.run import ADAPTER, assemble_run, prepare_base
from ..run.steps import Stepper
from ..run.train import (
    OUT_OF_MEMORY,
    TrainResult,
    conclude,
    run_folder,
)
from ..settings.config import TrainConfig
from ..settings.defaults import with_defaults
from ..settings.listing import read_subjects
from ..signals import Interrupted, StopRequests
from ..step.quantized import quantize_base
from ..step.randomness import forked
from .batched import BatchedTrainer, Failures, Member

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """The plan of a subject and its locked folder."""

    folder: RunFolder
    plan: Plan


def train_subjects(
    config: TrainConfig, only: Collection[str] | None = None, skip_failing: bool = False
) -> list[TrainResult]:
    """Train every subject of the list ``config.subjects`` on one frozen base, each in its folder ``output_dir/NAME``.

    Each subject has its own data, noise, loss, clipping, optimizer, schedule and random numbers. Its result equals that
    of a separate run, up to rounding in larger batches. If a subject fails, the others continue. ``only``: train these
    subjects of the list. ``skip_failing``: train the others also if one cannot start.

    Raises :class:`UserError` for a user's mistake before anything is written (unless ``skip_failing``), or at the end
    if subjects failed; :class:`.signals.Interrupted` after SIGINT or SIGTERM, once every unfinished subject has a
    checkpoint.
    """
    failures: Failures = {}
    with _opened(config, only, failures if skip_failing else None) as (accelerator, folders, stop, planned):
        if skip_failing:
            planned = [p for p in planned if _passes(p, config.strict, failures)]
        else:
            report(_findings(planned), config.strict)
        with _recording_failures(folders):
            members = _set_up([p for p in planned if not _is_finished(p)], accelerator, stop, failures)
            return BatchedTrainer(members, _conclude, config.rows_at_once, failures).run()


def check_subjects(config: TrainConfig) -> list[Finding]:
    """Run the preflight checks of all subjects without training; nothing is written."""
    with _opened(config) as (_, _, _, planned):
        return _findings(planned)


@contextmanager
def _collected(name: str, failures: Failures | None) -> Iterator[None]:
    """Add an error of a subject to ``failures``; if that is ``None``, raise it with the subject's name."""
    try:
        yield
    except Exception as error:
        text = None if out_of_memory(error) else explanation(error)
        if text is None:
            raise
        if failures is None:
            raise UserError(f"{name}: {text}") from error
        log.warning("%s failed; the other subjects continue: %s", name, text)
        failures[name] = text


@contextmanager
def _opened(
    config: TrainConfig, only: Collection[str] | None = None, failures: Failures | None = None
) -> Iterator[tuple[Accelerator, list[RunFolder], StopRequests, list[Planned]]]:
    """Lock the folders, open the base once and plan every subject."""
    configs = {name: own for name, own in read_subjects(config).items() if only is None or name in only}
    subjects: dict[str, Subject] = {}
    for name, own in configs.items():
        with _collected(name, failures):
            subjects[name] = read_subject(own)
    accelerator = build_accelerator(config)
    if accelerator.num_processes > 1:
        raise UserError("--subjects trains in one process: start it without `accelerate launch`")
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequests())
        if not config.folder.exists():
            stack.callback(_remove_if_empty, config.folder)
        folders: dict[str, RunFolder] = {}
        for name in subjects:
            with _collected(name, failures):
                folders[name] = stack.enter_context(run_folder(configs[name], accelerator))
        stack.enter_context(forked(accelerator.device))
        configs |= _resumed_together(configs, folders)
        pipe: Any = None
        planned = []
        token_owners: dict[str, str] = {}
        for name, folder in folders.items():
            own, subject = with_defaults(configs[name]), subjects[name]
            pipe = pipe or open_base(own, accelerator.device, opening_dtype([*configs.values()], accelerator.device))
            with _collected(name, failures):
                for token in subject.new_tokens:
                    if token_owners.setdefault(token, name) != name:
                        raise UserError(
                            f"{token_owners[token]} already has the new token {token!r}: give each subject its own"
                        )
                planned.append(Planned(folder, plan_run(own, subject, accelerator, folder, stop, pipe)))
        yield accelerator, [*folders.values()], stop, planned


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _findings(planned: Sequence[Planned]) -> list[Finding]:
    return [
        replace(finding, text=f"{p.folder.path.name}: {finding.text}") for p in planned for finding in preflight(p.plan)
    ]


def _resumed_together(configs: Mapping[str, TrainConfig], folders: Mapping[str, RunFolder]) -> dict[str, TrainConfig]:
    """The configs with ``latest`` replaced by the step from which all continue exactly: :func:`steps_to_resume`.

    A subject without a checkpoint of that step, such as one that failed before it, keeps ``latest``.
    """
    resuming = {name: folder for name, folder in folders.items() if configs[name].resume_from_checkpoint == "latest"}
    for folder in resuming.values():
        recover(folder.checkpoints)
    finished = {name for name, folder in resuming.items() if folder.was_done}
    changed = {}
    for name, step in steps_to_resume({n: f.checkpoints for n, f in resuming.items()}, finished).items():
        if step == 0:
            log.warning("%s starts over: the earlier run was killed while it wrote its first checkpoints", name)
        path = str(resuming[name].checkpoints / f"step-{step}") if step else None
        changed[name] = replace(configs[name], resume_from_checkpoint=path, overwrite_output_dir=step == 0)
    return changed


def _passes(planned: Planned, strict: bool, failures: Failures) -> bool:
    """Whether a subject passes its checks; else add them to ``failures``."""
    name = planned.folder.path.name
    with _collected(name, failures):
        report(preflight(planned.plan), strict)
    return name not in failures


def _is_finished(planned: Planned) -> bool:
    checkpoint, config = planned.plan.checkpoint, planned.plan.config
    if planned.folder.was_done and checkpoint is not None and checkpoint.step >= config.max_train_steps:
        log.info("%s is finished: %s", planned.folder.path.name, planned.folder.adapter)
        return True
    return False


def _set_up(
    planned: Sequence[Planned], accelerator: Accelerator, stop: StopRequests, failures: Failures
) -> list[Member]:
    """Encode the data of all subjects while the base is unchanged; then cast it and add the adapters."""
    encoded: list[tuple[Planned, RunData, PromptEmbeddings | None]] = []
    for p in planned:
        with _collected(p.folder.path.name, failures):
            data = encode(p.plan, accelerator, p.folder, stop)
            encoded.append((p, data, None if p.plan.config.encodes_each_step else data.embeddings()))
        if message := failures.get(p.folder.path.name):
            p.folder.state("failed", message=message)
    for p, _, _ in encoded:
        prepare_base(p.plan)
    members = []
    for number, (p, data, embeddings) in enumerate(encoded):
        stop.check()
        run = assemble_run(data, embeddings, f"{ADAPTER}-{number}")
        members.append(Member(p.folder.path.name, Stepper(run, accelerator, p.folder, stop, progress=False)))
    if members:
        quantize_base(planned[0].plan.config, planned[0].plan.pipe)
    return members


def _conclude(member: Member) -> TrainResult:
    stepper = member.stepper
    return conclude(stepper.run, stepper, stepper.folder)


@contextmanager
def _recording_failures(folders: Sequence[RunFolder]) -> Iterator[None]:
    """Write to the ``state.json`` of every unfinished subject how the run ended."""
    try:
        yield
    except Interrupted as interrupted:
        _set_status(folders, "interrupted", str(interrupted))
        raise
    except Exception as error:
        if out_of_memory(error):
            _set_status(folders, "failed", "out of memory")
            advice = OUT_OF_MEMORY.format(folder="each subject's folder")
            raise UserError(f"{advice}; a smaller --rows_at_once needs less memory") from error
        _set_status(folders, "failed", str(error))
        raise


def _set_status(folders: Sequence[RunFolder], status: Any, message: str) -> None:
    for folder in folders:
        if folder.status not in ("done", "failed"):
            folder.state(status, message=message)
