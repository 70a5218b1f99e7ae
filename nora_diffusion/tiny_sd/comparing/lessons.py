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
from ..measures.methods import is_trained, method_settings, split_rate
from ..measures.prompt_sets import asked
from ..measures.scores import BETTER
from ..measures.teaching import SCENES, Lesson, Student

COUNTS = {3: "three images", 6: "six images"}
"""What is shown, by the number of training images of each subject."""
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
    shown: int = 6
    prompts: tuple[str, ...] = SCENES

    @property
    def name(self) -> str:
        """The lesson's name in files and messages."""
        method = "".join(c if c.isalnum() or c in "_-." else "-" for c in self.method)
        rate = "" if self.rate is None else f"-{self.rate:g}"
        steps = "" if self.rate is None or self.steps is None else f"-{self.steps}"
        shown = "" if self.rate is None or self.shown == Task.shown else f"-of{self.shown}"
        return f"{method}{rate}{steps}{shown}-{self.seed}-{self.subject.replace('+', '_')}"

    def key(self, base: str) -> str:
        """A hash of everything the lesson depends on; ``base`` is the hash of the base's weights."""
        document = [base, {**method_settings(self.method), **self.student().settings}, asdict(self)]
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]

    def student(self) -> Student:
        """The adapter to train, with what overrides the settings of its method."""
        steps = {} if self.steps is None else {"max_train_steps": self.steps}
        rate = {} if self.rate is None else {"learning_rate": self.rate}
        settings = {"seed": self.seed, **rate, **steps}
        return Student(self.name, self.subject, self.method, settings, self.shown, self.prompts)


def all_tasks(
    methods: Iterable[str], rates: Sequence[float], seeds: Iterable[int], subjects: Sequence[str],
    **same: Any,
) -> list[Task]:  # fmt: skip
    """All lessons, seed by seed, so that an interrupted run has compared the methods on complete seeds.

    ``methods``: one as ``METHOD@RATE`` is trained at this rate only. ``same``: other values of :class:`Task`, the same
    for all.
    """
    tasks = []
    for seed, text in product(seeds, methods):
        method, own = split_rate(text)
        used = (None,) if not is_trained(method) else rates if own is None else (own,)
        tasks += [Task(method, rate, seed, subject, **same) for rate, subject in product(used, subjects)]
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
            {"key": t.key(base), **asdict(t), "task": COUNTS[t.shown], **measurements(lesson)}
            for t, lesson in zip(batch, lessons, strict=True)
        ]
        for number, (task, lesson, row) in enumerate(zip(batch, lessons, found, strict=True), start + 1):
            _save_sheets(lesson, out / "pictures", task.name)
            scores = ", ".join(f"{title(name)} {row[name]:.4g}" for name in BETTER if name in row)
            print(f"[{number}/{len(missing)}] {task.name}: {scores}", flush=True)
        _append(out, found)
        rows |= {row["key"]: row for row in found}
    return [rows[task.key(base)] for task in tasks]


def measurements(lesson: Lesson) -> Row:
    """The scores and costs of a lesson."""
    values = {**lesson.scores, "seconds": lesson.seconds, "cpu_seconds": lesson.cpu_seconds}
    row: Row = {name: round(value, 6) for name, value in values.items()}
    row |= {"bytes": lesson.bytes, "trained_numbers": lesson.trained_parameters}
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


def _save_sheets(lesson: Lesson, folder: Path, name: str) -> None:
    for prompt_set, images in lesson.images.items():
        captions = [scene.caption for _, scene in asked(prompt_set, lesson.subject)]
        file = folder / f"{name}{'' if prompt_set == SCENES[0] else f'-{prompt_set}'}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        cells = list(zip(images, captions, strict=True))
        contact_sheet([cells[start : start + 10] for start in range(0, len(cells), 10)]).save(file, optimize=True)


def title(name: str) -> str:
    """A measurement's name as the tables show it."""
    return "held-out loss" if name == "heldout_loss" else name.replace("_", " ")
