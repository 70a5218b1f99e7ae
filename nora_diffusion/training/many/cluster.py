"""Train many subjects on a cluster: ``--engine ray`` runs groups of subjects as Ray tasks and restarts killed ones.

All state is in the subjects' folders, and a restarted task resumes from their checkpoints. So all machines must see the
same photos, ``output_dir``, working directory and installed packages.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError, explanation, first_line, last_line
from ..planning.rundir import read_state
from ..settings.config import TrainConfig
from ..settings.listing import read_subjects
from ..signals import Interrupted, StopRequests
from .subjects import train_subjects

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
Rows = list[tuple[str, ...]]


@dataclass
class Group:
    """Subjects that one task trains, the number of times it was started, and its result."""

    names: list[str]
    tries: int = 0
    done: bool = False
    error: str = ""


def train_on_cluster(config: TrainConfig) -> int:
    """Train the list ``config.subjects`` on a Ray cluster and print a progress table; return 0.

    A task whose process dies is restarted up to ``task_retries`` times and resumes its subjects; finished subjects are
    not trained again. Raises :class:`UserError` at the end if subjects failed, and :class:`.signals.Interrupted` after
    SIGINT or SIGTERM, once all tasks have saved.
    """
    names = list(read_subjects(config))
    if config.overwrite_output_dir:
        raise UserError(
            "--engine ray cannot use --overwrite_output_dir, since a task may start twice: choose another --output_dir"
        )
    size = config.subjects_per_task
    groups = [Group(names[start : start + size]) for start in range(0, len(names), size)]
    table = Table(config.folder)
    with ray_cluster(config.address) as ray, StopRequests() as stop:
        running = {_start(ray, config, group): group for group in groups}
        canceled = False
        while running:
            table.show(groups)
            for task in ray.wait(list(running), timeout=POLL_SECONDS)[0]:
                group = running.pop(task)
                if _has_ended(ray, task, group, config.task_retries) or stop.received:
                    continue
                log.warning("the task of %s was killed: it is restarted from its checkpoints", ", ".join(group.names))
                running[_start(ray, config, group)] = group
            if stop.received and not canceled:
                canceled = True
                for task in running:
                    ray.cancel(task)  # like Ctrl-C in the task: it finishes its step and saves
    table.show(groups, last=True)
    if stop.received and not all(group.done for group in groups):
        steps = sum(table.step(name) for name in names)
        raise Interrupted(stop.received, steps, config.folder if steps else None)
    failed = [f"{', '.join(group.names)}: {group.error}" for group in groups if group.error]
    if failed:
        raise UserError("\n".join(failed))
    return 0


def train_group(settings: Mapping[str, Any], names: Sequence[str], working_directory: str) -> str:
    """Body of a task: train these subjects of the list; return the error message, or an empty string.

    A subject that cannot be trained, for example because of a damaged photo, does not stop the others.
    """
    os.chdir(working_directory)
    os.environ["TQDM_DISABLE"] = "1"
    try:
        train_subjects(TrainConfig(**settings), names, skip_failing=True)
    except Interrupted as stop:
        return str(stop)
    except Exception as error:
        text = explanation(error)
        if text is None:
            raise
        return text
    return ""


def _start(ray: Any, config: TrainConfig, group: Group) -> Any:
    """Start a task for a group, with one GPU if the cluster has GPUs. A restart always resumes."""
    settings = config.to_dict(secrets=True)
    if group.tries:
        settings["resume_from_checkpoint"] = "latest"
    group.tries += 1
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(train_group)
    return task.remote(settings, group.names, str(Path.cwd()))


def _has_ended(ray: Any, task: Any, group: Group, retries: int) -> bool:
    """Record the result of a task; return False if its process was killed and it may be restarted."""
    try:
        group.error = ray.get(task)
    except ray.exceptions.TaskCancelledError:
        group.error = "stopped before its training began"
    except ray.exceptions.RayTaskError as error:
        group.error = last_line(error)  # of the traceback in the task
    except ray.exceptions.RayError:
        if group.tries <= retries:
            return False
        group.error = (
            f"killed {group.tries} times, probably because it ran out of memory: use fewer --subjects_per_task or a "
            "smaller --train_batch_size, and continue with --resume_from_checkpoint latest"
        )
    group.done = not group.error
    return True


@contextmanager
def ray_cluster(address: str | None, user: str = "--engine ray") -> Iterator[Any]:
    """Connect to the Ray cluster at ``address``, or start one on this machine that ends with the run.

    ``user``: what needs it. Raises :class:`UserError` without Ray, or if there is no cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(f"{user} needs the package ray: pip install 'nora-diffusion[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = {} if address else {"include_dashboard": False}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except Exception as error:  # Ray raises a plain Exception if its start times out
        ray.shutdown()
        location = f"at --address {address}" if address else "on this machine"
        raise UserError(f"no Ray cluster {location}: {first_line(error)}; start one with `ray start --head`") from error
    try:
        yield ray
    finally:
        ray.shutdown()


class Table:
    """Progress table with one line per subject, read from the folders.

    On a terminal the table is redrawn in place; otherwise only lines whose state has changed are printed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._printed_lines = 0
        self._printed: set[tuple[str, str, str]] = set()

    def state(self, name: str) -> dict[str, Any]:
        """The content of a subject's ``state.json``; empty if it cannot be read."""
        return read_state(self.folder / name)

    def step(self, name: str) -> int:
        """The number of steps that a subject has trained."""
        step = self.state(name).get("step")
        return step if isinstance(step, int) else 0

    def rows(self, groups: Sequence[Group]) -> Rows:
        """Name, state, steps, loss and starts of each subject."""
        rows: Rows = []
        for group in groups:
            for name in group.names:
                state = self.state(name)
                status = "done" if group.done else str(state.get("status", "waiting"))
                if group.error and status not in ("done", "interrupted"):
                    status = "failed"
                loss = f"{state['loss']:.4f}" if isinstance(state.get("loss"), float) else ""
                steps = f"{self.step(name)}/{state.get('total', '?')}"
                rows.append((name, status, steps, loss, str(group.tries)))
        return rows

    def show(self, groups: Sequence[Group], last: bool = False) -> None:
        """Print the table on stderr."""
        rows, live = self.rows(groups), sys.stderr.isatty()
        now = {(name, status, tries) for name, status, _, _, tries in rows}
        if not live and not last:
            rows = [row for row in rows if (row[0], row[1], row[4]) in now - self._printed]
        if rows:
            lines = aligned([("subject", "state", "step", "loss", "starts"), *rows])
            back = f"\x1b[{self._printed_lines}F\x1b[J" if live and self._printed_lines else ""
            print(back + "\n".join(lines), file=sys.stderr, flush=True)
            self._printed, self._printed_lines = now, len(lines)


def aligned(rows: Rows) -> list[str]:
    """Lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
