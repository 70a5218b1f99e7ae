"""``python -m nora_diffusion.tiny_sd.comparing``: compare methods on held-out subjects over learning rates and seeds.

A lesson is one subject trained with one method, learning rate and seed, and one image of each of ten new scenes. Every
lesson is saved as a line of ``lessons.jsonl`` and a contact sheet in ``pictures/``, and is not repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ..errors import UserError, program, stop_signal
from ..io.files import locked_folder, sha256, write_atomic
from ..pipelines.base import EMBEDDED_WEIGHTS
from ..quiet import hide_known_warnings
from ..reports.sheets import contact_sheet
from ..scoring.metrics import interval, resampled
from ..training.settings.defaults import EMBEDDED
from ..training.signals import Interrupted
from .measures.teaching import (
    METHODS,
    TAUGHT_SUBJECTS,
    Lesson,
    Probes,
    fit_probes,
    method_settings,
    new_scenes,
    teach,
)
from .world.vocabulary import SUBJECTS

DEFAULT_METHODS = ("base", "nora", "lora", "lora_r2")
DEFAULT_RATES = (6e-4, 1.2e-3, 2.4e-3)
DEFAULT_SEEDS = (0, 1, 2)
SHARES = ("subject_right", "background_right", "both_right")
SCORES = ("subject_score", "prompt_score")
Row = dict[str, Any]
"""A line of ``lessons.jsonl``: key, task and measurements."""


@dataclass(frozen=True)
class Task:
    """A lesson to compute. The untrained base has no learning rate; its seed is that of its images."""

    method: str
    rate: float | None
    seed: int
    subject: str
    steps: int | None = None

    @property
    def name(self) -> str:
        """The lesson's name in files and messages."""
        return f"{self.method}{'' if self.rate is None else f'-{self.rate:g}'}-{self.seed}-{self.subject}"

    def key(self, base: str) -> str:
        """A hash of everything the lesson depends on; ``base`` is the hash of the base's weights."""
        document = [base, method_settings(self.method), asdict(self)]
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]

    def settings(self) -> dict[str, Any]:
        """What the lesson overrides in the training settings of the method."""
        steps = {} if self.steps is None else {"max_train_steps": self.steps}
        return {"seed": self.seed, "learning_rate": self.rate, **steps}


def all_tasks(
    methods: Iterable[str], rates: Sequence[float], seeds: Iterable[int], subjects: Sequence[str],
    steps: int | None = None,
) -> list[Task]:  # fmt: skip
    """All lessons, seed by seed, so that an interrupted run has compared the methods on complete seeds."""
    tasks = [
        Task(method, rate, seed, subject, steps)
        for seed, subject, method in product(seeds, subjects, methods)
        for rate in (rates if METHODS[method] is not None else (None,))
    ]
    return list(dict.fromkeys(tasks))


def compare(
    weights: Path,
    tasks: Sequence[Task],
    out: Path,
    teach: Callable[..., Lesson] = teach,
    probes: Callable[[], Probes] = fit_probes,
) -> list[Row]:
    """Compute the lessons that are missing in ``out`` and return the rows of all ``tasks``.

    Several processes may work in one folder on different lessons. Raises :class:`UserError` if ``weights`` has no base.
    """
    files = sorted(
        (weights / "pipeline").rglob("*.safetensors")
    )  # all components: a new decoder changes the images too
    if not files:
        raise UserError(f"{weights} holds no base: give a folder that `python -m nora_diffusion.tiny_sd.train` wrote")
    base, rows, fitted = "".join(map(sha256, files)), read_rows(out), None
    for number, task in enumerate(tasks, 1):
        if (key := task.key(base)) in rows:
            continue
        fitted = fitted or probes()
        lesson = teach(weights, fitted, task.subject, task.method, **task.settings())
        row = {"key": key, **asdict(task), **measurements(lesson)}
        _save_sheet(lesson, out / "pictures" / f"{task.name}.png")
        _append(out, row)
        rows[key] = row
        shares = ", ".join(f"{_title(share)} {row[share]:.0%}" for share in SHARES)
        print(f"[{number}/{len(tasks)}] {task.name}: {shares}, {row['seconds']:.0f} s", flush=True)
    return [rows[task.key(base)] for task in tasks]


def measurements(lesson: Lesson) -> Row:
    """The scores and costs of a lesson."""
    values = {name: getattr(lesson, name) for name in (*SHARES, *SCORES, "bytes", "seconds")}
    return {name: round(value, 4) for name, value in values.items()} | {"trained_numbers": lesson.trained_parameters}


def read_rows(out: Path) -> dict[str, Row]:
    """The saved lessons of a folder by key. Raises :class:`UserError` for a damaged file."""
    file = out / "lessons.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return {row["key"]: row for row in map(json.loads, lines)}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a list of lessons ({error}): choose another --out") from error


def _append(out: Path, row: Row) -> None:
    with locked_folder(out):
        rows = read_rows(out) | {row["key"]: row}
        write_atomic(out / "lessons.jsonl", "".join(json.dumps(r) + "\n" for r in rows.values()))


def _save_sheet(lesson: Lesson, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    captions = [scene.caption for scene in new_scenes(lesson.subject)]
    contact_sheet([list(zip(lesson.images, captions, strict=True))]).save(file, optimize=True)


def table_by_rate(rows: Sequence[Row]) -> str:
    """A row for each method and rate: mean over subjects ± standard deviation between seeds."""
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["rate"]), []).append(row)
    names = (*SHARES, *SCORES)
    lines = [_line("method", "rate", *map(_title, names), "trained parameters", "file", "seconds")]
    lines.append("|" + " --- |" * (len(names) + 5))
    for (method, rate), group in groups.items():
        costs = _costs(group) if rate is not None else ["", "", ""]
        lines.append(_line(method, f"{rate:g}" if rate else "", *(_mean(group, name) for name in names), *costs))
    return "\n".join(lines)


def _costs(group: Sequence[Row]) -> list[str]:
    seconds = statistics.median(row["seconds"] for row in group)
    return [f"{group[0]['trained_numbers']:,}", f"{group[0]['bytes'] / 1e6:.2f} MB", f"{seconds:.0f}"]


def _mean(group: Sequence[Row], name: str) -> str:
    by_seed: dict[int, list[float]] = {}
    for row in group:
        by_seed.setdefault(row["seed"], []).append(row[name])
    means = [statistics.fmean(values) for values in by_seed.values()]
    deviation = f" ± {statistics.stdev(means):.3f}" if len(means) > 1 else ""
    return f"{statistics.fmean(means):.3f}{deviation}"


def at_best_rate(rows: Sequence[Row], method: str) -> list[Row]:
    """A method's lessons, each subject's at the rate that was best on the *other* subjects (by ``both_right``).

    Choosing the rate on the lessons that are reported would favor the method with the larger noise.
    """
    own = [row for row in rows if row["method"] == method]
    chosen = []
    for subject in dict.fromkeys(row["subject"] for row in own):
        others = [row for row in own if row["subject"] != subject] or own
        rates = dict.fromkeys(row["rate"] for row in others)
        best = max(rates, key=lambda r: statistics.fmean(row["both_right"] for row in others if row["rate"] == r))
        chosen += [row for row in own if row["subject"] == subject and row["rate"] == best]
    return chosen


def table_at_best_rate(rows: Sequence[Row]) -> str:
    """Each trained method at its best rate, and its paired difference to the first one."""
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if METHODS[m] is not None]
    lines = [_line("method", *map(_title, SHARES), f"both right, minus {methods[0]}'s"), "|" + " --- |" * 5]
    reference = {(row["subject"], row["seed"]): row["both_right"] for row in at_best_rate(rows, methods[0])}
    for method in methods:
        own = at_best_rate(rows, method)
        gaps = [row["both_right"] - reference[row["subject"], row["seed"]] for row in own]
        by_subject: dict[str, list[int]] = {}
        for i, row in enumerate(own):
            by_subject.setdefault(row["subject"], []).append(i)
        low, high = interval(gaps, resampled(by_subject))
        gap = f"{statistics.fmean(gaps):+.3f} [{low:+.3f}, {high:+.3f}]" if method != methods[0] else ""
        lines.append(_line(method, *(f"{statistics.fmean(row[n] for row in own):.3f}" for n in SHARES), gap))
    return "\n".join(lines)


def _title(name: str) -> str:
    return name.replace("_", " ")


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def report(rows: Sequence[Row]) -> str:
    """Both tables in Markdown."""
    subjects, seeds = (len({row[name] for row in rows}) for name in ("subject", "seed"))
    text = f"{subjects} subjects, {seeds} seeds, ten new scenes each: mean over subjects ± deviation between seeds.\n"
    text += f"\n{table_by_rate(rows)}\n"
    if any(METHODS[row["method"]] is not None for row in rows):
        text += (
            "\nEach subject at the rate that was best on the other subjects. The difference is paired by subject and "
            f"seed, with a 95% bootstrap interval.\n\n{table_at_best_rate(rows)}\n"
        )
    return text


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Train several methods on held-out subjects, over learning rates and seeds, and write a table of scores."""

    def default(values: Sequence[Any]) -> str:
        return f"(default: {' '.join(map(str, values))})"

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=DEFAULT_METHODS, metavar="METHOD",
                        help=f"of {', '.join(METHODS)} {default(DEFAULT_METHODS)}")  # fmt: skip
    parser.add_argument("--rates", nargs="+", type=float, default=DEFAULT_RATES, metavar="RATE",
                        help=f"learning rates, the same for every method {default(DEFAULT_RATES)}")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=DEFAULT_SEEDS, metavar="SEED",
                        help=f"of training and images {default(DEFAULT_SEEDS)}")  # fmt: skip
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=TAUGHT_SUBJECTS, metavar="SUBJECT",
                        help=f"folder names of examples/subjects {default(TAUGHT_SUBJECTS)}")  # fmt: skip
    parser.add_argument("--max_train_steps", type=int,
                        help=f"steps of each training (default: {EMBEDDED['max_train_steps']})")  # fmt: skip
    parser.add_argument("--weights", type=Path, default=EMBEDDED_WEIGHTS, help="folder of the base (default: shipped)")
    parser.add_argument("--out", type=Path, default=Path("outputs/comparing"),
                        help="folder for lessons.jsonl, report.md and pictures/ (default: %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    hide_known_warnings()
    tasks = all_tasks(args.methods, args.rates, args.seeds, args.subjects, args.max_train_steps)
    try:
        text = report(compare(args.weights, tasks, args.out))
        write_atomic(args.out / "report.md", text)
    except (Interrupted, KeyboardInterrupt) as stop:
        print("Stopped. Finished lessons are saved; run the same command again to continue.", file=sys.stderr)
        return stop.exit_code if isinstance(stop, Interrupted) else 128 + stop_signal(stop)
    print(f"\n{text}\nWrote {args.out / 'report.md'}. The measurements of every lesson are in lessons.jsonl.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
