"""Train several subjects in one run (``--subjects subjects.yaml``), with the same results as separate runs."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ...errors import UserError, out_of_memory
from ..data.subject import read_subject
from ..planning.opening import open_base, opening_dtype
from ..planning.plan import Plan, plan_run
from ..planning.preflight import Finding, preflight, report
from ..planning.rundir import RunFolder
from ..run.encoding import encode
from ..run.run import ADAPTER, assemble_run, prepare_base
from ..run.steps import Stepper
from ..run.train import (
    OUT_OF_MEMORY,
    TrainResult,
    build_accelerator,
    conclude,
    run_folder,
)
from ..settings.config import TrainConfig
from ..settings.defaults import with_defaults
from ..settings.listing import read_subjects
from ..signals import Interrupted, StopRequests
from ..step.quantized import quantize_base
from ..step.randomness import forked
from .batched import BatchedTrainer, Member

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """The plan of a subject and its locked folder."""

    folder: RunFolder
    plan: Plan


def train_subjects(config: TrainConfig, only: Collection[str] | None = None) -> list[TrainResult]:
    """Train every subject of the list ``config.subjects`` on one frozen base, each in its folder ``output_dir/NAME``.

    Each subject has its own data, noise, loss, clipping, optimizer, schedule and random numbers. Its result equals that
    of a separate run, up to rounding in larger batches. If a subject fails, the others continue. ``only``: train these
    subjects of the list. Raises :class:`UserError` for a user's mistake before anything is written, or at the end if
    subjects failed; :class:`.signals.Interrupted` after SIGINT or SIGTERM, once every unfinished subject has a
    checkpoint.
    """
    with _opened(config, only) as (accelerator, folders, stop, planned):
        report(_findings(planned), config.strict)
        with _recording_failures(folders):
            members = _set_up([p for p in planned if not _is_finished(p)], accelerator, stop)
            return BatchedTrainer(members, _conclude, config.rows_at_once).run()


def check_subjects(config: TrainConfig) -> list[Finding]:
    """Run the preflight checks of all subjects without training; nothing is written."""
    with _opened(config) as (_, _, _, planned):
        return _findings(planned)


@contextmanager
def _opened(
    config: TrainConfig, only: Collection[str] | None = None
) -> Iterator[tuple[Accelerator, list[RunFolder], StopRequests, list[Planned]]]:
    """Lock the folders, open the base once and plan every subject."""
    configs = {name: own for name, own in read_subjects(config).items() if only is None or name in only}
    subjects = {name: read_subject(own) for name, own in configs.items()}
    accelerator = build_accelerator(config)
    if accelerator.num_processes > 1:
        raise UserError("--subjects trains in one process: start it without `accelerate launch`")
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequests())
        if not config.folder.exists():
            stack.callback(_remove_if_empty, config.folder)
        folders = [stack.enter_context(run_folder(own, accelerator)) for own in configs.values()]
        stack.enter_context(forked(accelerator.device))
        pipe: Any = None
        planned = []
        token_owners: dict[str, str] = {}
        for (name, subject), folder in zip(subjects.items(), folders, strict=True):
            own = with_defaults(configs[name])
            pipe = pipe or open_base(own, accelerator.device, opening_dtype([*configs.values()], accelerator.device))
            try:
                planned.append(Planned(folder, plan_run(own, subject, accelerator, folder, stop, pipe)))
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
            for token in subject.new_tokens:
                if token_owners.setdefault(token, name) != name:
                    raise UserError(
                        f"{name}: {token_owners[token]} already has the new token {token!r}: give each subject its own"
                    )
        yield accelerator, folders, stop, planned


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _findings(planned: Sequence[Planned]) -> list[Finding]:
    return [
        replace(finding, text=f"{p.folder.path.name}: {finding.text}") for p in planned for finding in preflight(p.plan)
    ]


def _is_finished(planned: Planned) -> bool:
    checkpoint, config = planned.plan.checkpoint, planned.plan.config
    finished = checkpoint is not None and checkpoint.step >= config.max_train_steps
    if finished and planned.folder.adapter.exists():
        log.info("%s is finished: %s", planned.folder.path.name, planned.folder.adapter)
        return True
    return False


def _set_up(planned: Sequence[Planned], accelerator: Accelerator, stop: StopRequests) -> list[Member]:
    """Encode the data of all subjects while the base is unchanged; then cast it and add the adapters."""
    data = [encode(p.plan, accelerator, p.folder, stop) for p in planned]
    embeddings = [None if own.plan.config.encodes_each_step else own.embeddings() for own in data]
    for p in planned:
        prepare_base(p.plan)
    members = []
    for number, (p, own) in enumerate(zip(planned, data, strict=True)):
        stop.check()
        run = assemble_run(own, embeddings[number], f"{ADAPTER}-{number}")
        members.append(Member(p.folder.path.name, Stepper(run, accelerator, p.folder, stop, progress=False)))
    if planned:
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
