"""Many subjects over a cluster: ``--engine ray`` trains groups of the list as tasks, started again if they are killed.

The subjects' folders hold all that there is to know, so the machines must share the disk of the photos and of
``output_dir``, the working directory and the installed packages; a task that is started again goes on from checkpoints.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError, first_line
from ...io.run_layout import STATE
from ..settings.config import TrainConfig
from ..settings.listing import read_subjects
from ..signals import Interrupted, StopRequests
from .subjects import train_subjects

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
Rows = list[tuple[str, ...]]


@dataclass
class Group:
    """Subjects that one task trains; how often it was started, and how it ended."""

    names: list[str]
    tries: int = 0
    done: bool = False
    error: str = ""


def train_on_cluster(config: TrainConfig) -> int:
    """Train the list ``config.subjects`` on a Ray cluster and print one table of its progress; returns 0.

    A task whose process dies is started again up to ``task_retries`` times and resumes its subjects; those that are
    finished are not trained again. Raises :class:`UserError` at the end for the subjects that failed, and
    :class:`.signals.Interrupted` after SIGINT or SIGTERM, when all tasks have saved.
    """
    names = list(read_subjects(config))
    if config.overwrite_output_dir:
        raise UserError("--engine ray does not overwrite, since its tasks may start twice: choose another --output_dir")
    size = config.subjects_per_task
    groups = [Group(names[start : start + size]) for start in range(0, len(names), size)]
    table = Table(config.folder)
    with _cluster(config.address) as ray, StopRequests() as stop:
        running = {_start(ray, config, group): group for group in groups}
        told = False
        while running:
            table.show(groups)
            for task in ray.wait(list(running), timeout=LOOK_SECONDS)[0]:
                group = running.pop(task)
                if _ended(ray, task, group, config.task_retries) or stop.received:
                    continue
                log.warning("the task of %s was killed: it goes on from its checkpoints", ", ".join(group.names))
                running[_start(ray, config, group)] = group
            if stop.received and not told:
                told = True
                for task in running:
                    ray.cancel(task)  # as Ctrl-C in the task: it finishes its step and saves
    table.show(groups, last=True)
    if stop.received:
        steps = sum(int(table.state(name).get("step", 0)) for name in names)
        raise Interrupted(stop.received, steps, config.folder if steps else None)
    failed = [f"{', '.join(group.names)}: {group.error}" for group in groups if group.error]
    if failed:
        raise UserError("\n".join(failed))
    return 0


def train_group(settings: Mapping[str, Any], names: Sequence[str], place: str) -> str:
    """What a task does in its process: train these subjects of the list; returns what went wrong."""
    os.chdir(place)
    os.environ["TQDM_DISABLE"] = "1"
    try:
        train_subjects(TrainConfig(**settings), names)
    except (UserError, Interrupted) as error:
        return str(error)
    return ""


def _start(ray: Any, config: TrainConfig, group: Group) -> Any:
    """A task for a group: with a GPU to itself, where the cluster has any. A further start always resumes."""
    settings = config.to_dict(secrets=True)
    if group.tries:
        settings["resume_from_checkpoint"] = "latest"
    group.tries += 1
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(train_group)
    return task.remote(settings, group.names, str(Path.cwd()))


def _ended(ray: Any, task: Any, group: Group, retries: int) -> bool:
    """Whether a task came to an end of its own; if its process was killed, whether it was tried often enough."""
    try:
        group.error = ray.get(task)
    except (ray.exceptions.RayTaskError, ray.exceptions.TaskCancelledError) as error:
        group.error = str(error).strip().splitlines()[-1]
    except ray.exceptions.RayError:
        if group.tries <= retries:
            return False
        group.error = (
            f"killed {group.tries} times, probably for want of memory: fewer --subjects_per_task or a smaller "
            "--train_batch_size need less; --resume_from_checkpoint latest goes on"
        )
    group.done = not group.error
    return True


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected: to ``address``, else to one that is started on this machine and ends with the run."""
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray needs the package ray: pip install 'nora-diffusion[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = {} if address else {"include_dashboard": False}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except Exception as error:  # of a start that took too long Ray says so by a plain one
        ray.shutdown()
        place = f"at --address {address}" if address else "on this machine"
        raise UserError(f"no Ray cluster {place}: {first_line(error)}; start one with `ray start --head`") from error
    try:
        yield ray
    finally:
        ray.shutdown()


class Table:
    """One line a subject, read from the folders: redrawn in place on a terminal, else the lines whose state changes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._drawn = 0
        self._before: set[tuple[str, str, str]] = set()

    def state(self, name: str) -> dict[str, Any]:
        """What a subject's ``state.json`` says."""
        try:
            return dict(json.loads((self.folder / name / STATE).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def rows(self, groups: Sequence[Group]) -> Rows:
        """Name, state, steps, loss and starts of each subject."""
        rows: Rows = []
        for group in groups:
            for name in group.names:
                state = self.state(name)
                status = "done" if group.done else state.get("status", "waiting")
                if group.error and status not in ("done", "interrupted"):
                    status = "failed"
                loss = f"{state['loss']:.4f}" if isinstance(state.get("loss"), float) else ""
                steps = f"{state.get('step', 0)}/{state.get('total', '?')}"
                rows.append((name, status, steps, loss, str(group.tries)))
        return rows

    def show(self, groups: Sequence[Group], last: bool = False) -> None:
        """Print the table on stderr."""
        rows, live = self.rows(groups), sys.stderr.isatty()
        now = {(name, status, tries) for name, status, _, _, tries in rows}
        if not live and not last:
            rows = [row for row in rows if (row[0], row[1], row[4]) in now - self._before]
        if rows:
            lines = drawn([("subject", "state", "step", "loss", "starts"), *rows])
            back = f"\x1b[{self._drawn}F\x1b[J" if live and self._drawn else ""
            print(back + "\n".join(lines), file=sys.stderr, flush=True)
            self._before, self._drawn = now, len(lines)


def drawn(rows: Rows) -> list[str]:
    """Lines with columns of one width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
