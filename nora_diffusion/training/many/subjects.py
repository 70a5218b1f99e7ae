"""Several subjects in one run: ``--subjects subjects.yaml``, each of them as if it were trained alone."""

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
from ..run.run import ADAPTER, prepare_base, put_in
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
    """A subject whose run is settled and has not begun."""

    folder: RunFolder
    plan: Plan


def train_subjects(config: TrainConfig, only: Collection[str] | None = None) -> list[TrainResult]:
    """Train every subject of the list ``config.subjects`` on one frozen base; ``output_dir/NAME`` is its run's folder.

    A subject's result is that of its own run, up to the rounding of its rows in a larger batch: data, noise, loss,
    clipping, optimizer, schedule and random numbers are its own. Subjects finish when they are through; one that
    fails is left out, and the others go on. Raises :class:`UserError` for a user's mistake before anything is
    written, or at the end for the subjects that failed; :class:`.signals.Interrupted` after SIGINT or SIGTERM, when
    every subject that was in training has a checkpoint. ``only`` names some of the list.
    """
    with _opened(config, only) as (accelerator, folders, stop, planned):
        report(_findings(planned), config.strict)
        with _told(folders):
            members = _set_up([p for p in planned if not _is_finished(p)], accelerator, stop)
            crowd = BatchedTrainer(members, _conclude, config.rows_at_once)
            return crowd.run()


def check_subjects(config: TrainConfig) -> list[Finding]:
    """What speaks against a run of several subjects, without training; nothing is written."""
    with _opened(config) as (_, _, _, planned):
        return _findings(planned)


@contextmanager
def _opened(
    config: TrainConfig, only: Collection[str] | None = None
) -> Iterator[tuple[Accelerator, list[RunFolder], StopRequests, list[Planned]]]:
    """The folders, locked, and the plan of every subject on one base."""
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
        words: dict[str, str] = {}
        for (name, subject), folder in zip(subjects.items(), folders, strict=True):
            own = with_defaults(configs[name])
            pipe = pipe or open_base(own, accelerator.device, opening_dtype([*configs.values()], accelerator.device))
            try:
                planned.append(Planned(folder, plan_run(own, subject, accelerator, folder, stop, pipe)))
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
            for word in subject.new_tokens:
                if words.setdefault(word, name) != name:
                    raise UserError(f"{name}: the new token {word!r} is that of {words[word]}: give each its own")
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
    """Encode everybody's data while the base is as it was loaded; then lower its precision and put the adapters in."""
    data = [encode(p.plan, accelerator, p.folder, stop) for p in planned]
    embeddings = [None if own.plan.config.encodes_each_step else own.embeddings() for own in data]
    for p in planned:
        prepare_base(p.plan)
    members = []
    for number, (p, own) in enumerate(zip(planned, data, strict=True)):
        stop.check()
        run = put_in(own, embeddings[number], f"{ADAPTER}-{number}")
        members.append(Member(p.folder.path.name, Stepper(run, accelerator, p.folder, stop, progress=False)))
    if planned:
        quantize_base(planned[0].plan.config, planned[0].plan.pipe)
    return members


def _conclude(member: Member) -> TrainResult:
    stepper = member.stepper
    return conclude(stepper.run, stepper, stepper.folder)


@contextmanager
def _told(folders: Sequence[RunFolder]) -> Iterator[None]:
    """Have every unfinished subject's ``state.json`` say how the run ended."""
    try:
        yield
    except Interrupted as interrupted:
        _tell(folders, "interrupted", str(interrupted))
        raise
    except Exception as error:
        if out_of_memory(error):
            _tell(folders, "failed", "out of memory")
            place = "each subject's folder"
            raise UserError(f"{OUT_OF_MEMORY.format(folder=place)}; --rows_at_once makes passes smaller") from error
        _tell(folders, "failed", str(error))
        raise


def _tell(folders: Sequence[RunFolder], status: Any, message: str) -> None:
    for folder in folders:
        if folder.status not in ("done", "failed"):
            folder.state(status, message=message)
