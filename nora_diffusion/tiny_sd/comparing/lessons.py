"""The lessons of a comparison: computed in batches, saved one per line, and never repeated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Protocol

from ...errors import UserError
from ...io.files import locked_folder, sha256, write_atomic
from ...reports.sheets import contact_sheet
from ..measures.methods import is_trained, method_settings
from ..measures.teaching import Lesson, Student, new_scenes

SHARES = ("subject_right", "background_right", "both_right")
SCORES = ("heldout_loss", "subject_score", "prompt_score")
Row = dict[str, Any]
"""A line of ``lessons.jsonl``: key, task and measurements."""


class Teacher(Protocol):
    """What computes lessons: ``measures.classroom.Classroom``."""

    def teach(self, students: Sequence[Student]) -> list[Lesson]:
        """The lessons of these adapters, trained together."""


@dataclass(frozen=True)
class Task:
    """A lesson to compute. The untrained base has no learning rate; its seed is that of its images."""

    method: str
    rate: float | None
    seed: int
    subject: str
    steps: int | None = None
    precision: str = "no"

    @property
    def name(self) -> str:
        """The lesson's name in files and messages."""
        method = "".join(c if c.isalnum() or c in "_-." else "-" for c in self.method)
        return f"{method}{'' if self.rate is None else f'-{self.rate:g}'}-{self.seed}-{self.subject}"

    def key(self, base: str) -> str:
        """A hash of everything the lesson depends on; ``base`` is the hash of the base's weights."""
        document = [base, method_settings(self.method), asdict(self)]
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]

    def student(self) -> Student:
        """The adapter to train, with what overrides the settings of its method."""
        steps = {} if self.steps is None else {"max_train_steps": self.steps}
        rate = {} if self.rate is None else {"learning_rate": self.rate}
        return Student(self.name, self.subject, self.method, {"seed": self.seed, **rate, **steps})


def all_tasks(
    methods: Iterable[str], rates: Sequence[float], seeds: Iterable[int], subjects: Sequence[str],
    steps: int | None = None, precision: str = "no",
) -> list[Task]:  # fmt: skip
    """All lessons, seed by seed, so that an interrupted run has compared the methods on complete seeds."""
    tasks = [
        Task(method, rate, seed, subject, steps, precision)
        for seed, method in product(seeds, methods)
        for rate, subject in product(rates if is_trained(method) else (None,), subjects)
    ]
    return list(dict.fromkeys(tasks))


def base_hash(weights: Path) -> str:
    """The hash of all components: a new decoder changes the images too. Raises :class:`UserError` without a base."""
    files = sorted((weights / "pipeline").rglob("*.safetensors"))
    if not files:
        raise UserError(f"{weights} holds no base: give a folder that `python -m nora_diffusion.tiny_sd.train` wrote")
    return "".join(map(sha256, files))


def compare(base: str, tasks: Sequence[Task], out: Path, teacher: Teacher, at_once: int = 1) -> list[Row]:
    """Compute the lessons that are missing in ``out``, ``at_once`` in a batch; return the rows of all ``tasks``.

    ``base``: :func:`base_hash`. Several processes may work in one folder on different lessons.
    """
    rows = read_rows(out)
    missing = [task for task in tasks if task.key(base) not in rows]
    for start in range(0, len(missing), at_once):
        batch = missing[start : start + at_once]
        lessons = teacher.teach([task.student() for task in batch])
        found = [
            {"key": t.key(base), **asdict(t), **measurements(lesson)} for t, lesson in zip(batch, lessons, strict=True)
        ]
        for number, (task, lesson, row) in enumerate(zip(batch, lessons, found, strict=True), start + 1):
            _save_sheet(lesson, out / "pictures" / f"{task.name}.png")
            shares = ", ".join(f"{title(share)} {row[share]:.0%}" for share in SHARES)
            print(
                f"[{number}/{len(missing)}] {task.name}: held-out loss {row['heldout_loss']:.4f}, {shares}", flush=True
            )
        _append(out, found)
        rows |= {row["key"]: row for row in found}
    return [rows[task.key(base)] for task in tasks]


def measurements(lesson: Lesson) -> Row:
    """The scores and costs of a lesson."""
    values = {name: getattr(lesson, name) for name in (*SHARES, *SCORES, "bytes", "seconds", "cpu_seconds")}
    row: Row = {name: round(value, 6) for name, value in values.items()}
    row["trained_numbers"] = lesson.trained_parameters
    return row | ({"error": lesson.error} if lesson.error else {})


def read_rows(out: Path) -> dict[str, Row]:
    """The saved lessons of a folder by key. Raises :class:`UserError` for a damaged file."""
    file = out / "lessons.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return {row["key"]: row for row in map(json.loads, lines)}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a list of lessons ({error}): choose another --out") from error


def _append(out: Path, found: Sequence[Row]) -> None:
    with locked_folder(out):
        rows = read_rows(out) | {row["key"]: row for row in found}
        write_atomic(out / "lessons.jsonl", "".join(json.dumps(r) + "\n" for r in rows.values()))


def _save_sheet(lesson: Lesson, file: Path) -> None:
    if lesson.images:
        file.parent.mkdir(parents=True, exist_ok=True)
        captions = [scene.caption for scene in new_scenes(lesson.subject)]
        contact_sheet([list(zip(lesson.images, captions, strict=True))]).save(file, optimize=True)


def title(name: str) -> str:
    """A measurement's name as the tables show it."""
    return "held-out loss" if name == "heldout_loss" else name.replace("_", " ")
