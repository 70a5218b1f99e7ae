"""``python -m nora_diffusion.tiny_sd.comparing``: methods side by side on held-out subjects, over rates and seeds.

A lesson is one subject, learned by one method at one learning rate from one seed, then drawn in ten new scenes. Each is
a line of ``lessons.jsonl`` and a sheet in ``pictures/``; a lesson that is there is not learned again.
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

from ..errors import UserError
from ..io.files import locked_folder, sha256, write_atomic
from ..pipelines.base import EMBEDDED_WEIGHTS
from ..quiet import hush
from ..scoring.metrics import interval, resampled
from ..training.run.signals import Interrupted
from ..training.settings.defaults import EMBEDDED
from .measures.teaching import METHODS, SUBJECTS, Lesson, Probes, fit_probes, new_scenes, teach
from .world.vocabulary import SUBJECTS as HELD_OUT

COMPARED = ("base", "nora", "lora", "lora_r2")
RATES = (6e-4, 1.2e-3, 2.4e-3)
SHARES = ("subject_right", "background_right", "both_right")
SCORES = ("subject_score", "prompt_score")
Teach = Callable[..., Lesson]


@dataclass(frozen=True)
class Task:
    """One lesson to learn. The base alone has no learning rate; its seeds are those of its pictures."""

    method: str
    rate: float | None
    seed: int
    subject: str
    steps: int | None = None

    def key(self, weights: str) -> str:
        """A name by all that the lesson depends on: the base's weights, the subject, the settings."""
        document = [weights, EMBEDDED, METHODS[self.method], asdict(self)]
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]

    def values(self) -> dict[str, Any]:
        """What the trainer is told beside the method."""
        steps = {} if self.steps is None else {"max_train_steps": self.steps}
        return {"seed": self.seed, "learning_rate": self.rate, **steps}


def tasks(
    methods: Iterable[str], rates: Sequence[float], seeds: Iterable[int], subjects: Sequence[str],
    steps: int | None = None,
) -> list[Task]:  # fmt: skip
    """All lessons, one seed after the other, so that a run cut short has compared the methods by whole seeds."""
    found = [
        Task(method, rate, seed, subject, steps)
        for seed, subject, method in product(seeds, subjects, methods)
        for rate in (rates if METHODS[method] is not None else (None,))
    ]
    return list(dict.fromkeys(found))


def compare(
    weights: Path, wanted: Sequence[Task], out: Path, teach: Teach = teach, probes: Callable[[], Probes] = fit_probes
) -> list[dict[str, Any]]:
    """Learn what is missing in ``out``; returns the rows of all ``wanted`` lessons.

    Several processes may work in one folder on different lessons.
    """
    file = weights / "pipeline/unet/diffusion_pytorch_model.safetensors"
    if not file.is_file():
        raise UserError(f"{weights} holds no base: {file} is missing; name a folder that tiny_sd.train wrote")
    parts = sorted((weights / "pipeline").rglob("*.safetensors"))  # a new decoder draws other pictures, too
    base, done, fitted = "".join(sha256(part) for part in parts), read_rows(out), None
    for number, task in enumerate(wanted, 1):
        if (key := task.key(base)) in done:
            continue
        fitted = fitted or probes()
        lesson = teach(weights, fitted, task.subject, task.method, **task.values())
        row = {"key": key, **asdict(task), **numbers_of(lesson)}
        _draw(lesson, out / "pictures" / f"{name_of(task)}.png")
        _append(out, row)
        done[key] = row
        told = ", ".join(f"{share.replace('_', ' ')} {row[share]:.0%}" for share in SHARES)
        print(f"[{number}/{len(wanted)}] {name_of(task)}: {told}, {row['seconds']:.0f} s", flush=True)
    return [done[task.key(base)] for task in wanted]


def name_of(task: Task) -> str:
    """What a lesson is called in files and messages."""
    return f"{task.method}{'' if task.rate is None else f'-{task.rate:g}'}-{task.seed}-{task.subject}"


def numbers_of(lesson: Lesson) -> dict[str, Any]:
    """A lesson's measurements."""
    names = (*SHARES, *SCORES, "trained_numbers", "bytes", "seconds")
    return {name: round(getattr(lesson, name), 4) for name in names}


def read_rows(out: Path) -> dict[str, dict[str, Any]]:
    """The lessons of a folder by their keys. Raises :class:`UserError` for a damaged file."""
    file = out / "lessons.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return {row["key"]: row for row in map(json.loads, lines)}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no list of lessons ({error}): choose another --out") from error


def _append(out: Path, row: dict[str, Any]) -> None:
    with locked_folder(out):
        rows = read_rows(out) | {row["key"]: row}
        write_atomic(out / "lessons.jsonl", "".join(json.dumps(r) + "\n" for r in rows.values()))


def _draw(lesson: Lesson, file: Path) -> None:
    from ..reports.sheets import contact_sheet

    file.parent.mkdir(parents=True, exist_ok=True)
    captions = [scene.caption for scene in new_scenes(lesson.subject)]
    cells = list(zip(lesson.pictures, captions, strict=True))
    contact_sheet([cells]).save(file, optimize=True)


def by_rate(rows: Sequence[dict[str, Any]]) -> str:
    """A table with a line for each method and rate: mean over subjects, and its deviation from seed to seed."""
    groups: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["rate"]), []).append(row)
    names = (*SHARES, *SCORES)
    lines = [_cells("method", "rate", *(n.replace("_", " ") for n in names), "trained numbers", "file", "seconds")]
    lines.append("|" + " --- |" * (len(names) + 5))
    for (method, rate), group in groups.items():
        costs = _costs(group) if rate is not None else ["", "", ""]
        lines.append(_cells(method, f"{rate:g}" if rate else "", *(_spread(group, name) for name in names), *costs))
    return "\n".join(lines)


def _costs(group: Sequence[dict[str, Any]]) -> list[str]:
    seconds = statistics.median(row["seconds"] for row in group)
    return [f"{group[0]['trained_numbers']:,}", f"{group[0]['bytes'] / 1e6:.2f} MB", f"{seconds:.0f}"]


def _spread(group: Sequence[dict[str, Any]], name: str) -> str:
    by_seed: dict[int, list[float]] = {}
    for row in group:
        by_seed.setdefault(row["seed"], []).append(row[name])
    means = [statistics.fmean(values) for values in by_seed.values()]
    spread = f" ± {statistics.stdev(means):.3f}" if len(means) > 1 else ""
    return f"{statistics.fmean(means):.3f}{spread}"


def at_best_rate(rows: Sequence[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    """A method's lessons, each subject's at the rate that was best on the *other* subjects (by ``both_right``).

    A rate chosen on the lessons that are then shown would flatter the method with the larger noise.
    """
    own = [row for row in rows if row["method"] == method]
    chosen = []
    for subject in dict.fromkeys(row["subject"] for row in own):
        others = [row for row in own if row["subject"] != subject] or own
        rates = dict.fromkeys(row["rate"] for row in others)
        best = max(rates, key=lambda r: statistics.fmean(row["both_right"] for row in others if row["rate"] == r))
        chosen += [row for row in own if row["subject"] == subject and row["rate"] == best]
    return chosen


def against_first(rows: Sequence[dict[str, Any]]) -> str:
    """Each method at its best rate, and the difference to the first one that learns, lesson by lesson."""
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if METHODS[m] is not None]
    lines = [_cells("method", *(f"{n.replace('_', ' ')}" for n in SHARES), f"both right, less {methods[0]}'s")]
    lines.append("|" + " --- |" * 5)
    reference = {(row["subject"], row["seed"]): row["both_right"] for row in at_best_rate(rows, methods[0])}
    for method in methods:
        own = at_best_rate(rows, method)
        gaps = [row["both_right"] - reference[row["subject"], row["seed"]] for row in own]
        groups: dict[str, list[int]] = {}
        for number, row in enumerate(own):
            groups.setdefault(row["subject"], []).append(number)
        low, high = interval(gaps, resampled(groups))
        gap = f"{statistics.fmean(gaps):+.3f} [{low:+.3f}, {high:+.3f}]" if method != methods[0] else ""
        lines.append(_cells(method, *(f"{statistics.fmean(row[n] for row in own):.3f}" for n in SHARES), gap))
    return "\n".join(lines)


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Both tables as markdown."""
    subjects, seeds = (len({row[name] for row in rows}) for name in ("subject", "seed"))
    text = f"{subjects} subjects, {seeds} seeds, ten new scenes each: mean over subjects ± deviation between seeds.\n"
    text += f"\n{by_rate(rows)}\n"
    if any(METHODS[row["method"]] is not None for row in rows):
        text += (
            "\nEach subject at the rate that was best on the other subjects; the difference lesson by lesson, with its "
            f"95 % bootstrap interval over subjects and seeds.\n\n{against_first(rows)}\n"
        )
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Teach held-out subjects by several methods, learning rates and seeds, and write a table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(COMPARED), metavar="METHOD",
                        help=f"of {', '.join(METHODS)} (default: {' '.join(COMPARED)})")  # fmt: skip
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), metavar="RATE",
                        help="learning rates, the same for every method (default: 6e-4 1.2e-3 2.4e-3)")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED",
                        help="of training and pictures (default: 0 1 2)")  # fmt: skip
    parser.add_argument("--subjects", nargs="+", choices=list(HELD_OUT), default=list(SUBJECTS), metavar="SUBJECT",
                        help=f"folder names of examples/subjects (default: {' '.join(SUBJECTS)})")  # fmt: skip
    parser.add_argument("--max_train_steps", type=int, help="steps of each training (default: 300)")
    parser.add_argument("--weights", type=Path, default=EMBEDDED_WEIGHTS, help="the base (default: the shipped one)")
    parser.add_argument("--out", type=Path, default=Path("outputs/comparing"),
                        help="folder of lessons.jsonl, report.md and pictures/ (default: %(default)s)")  # fmt: skip
    values = parser.parse_args(argv)
    hush()
    wanted = tasks(values.methods, values.rates, values.seeds, values.subjects, values.max_train_steps)
    try:
        text = report(compare(values.weights, wanted, values.out))
        write_atomic(values.out / "report.md", text)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt):
        print("stopped: finished lessons are kept, and the same command goes on with the others", file=sys.stderr)
        return 130
    print(f"\n{text}\nwrote {values.out / 'report.md'}; every lesson's numbers are in lessons.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
