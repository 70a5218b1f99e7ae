"""The command line of a comparison."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import UserError, stop_signal
from ...io.files import write_atomic
from ...pipelines.base import EMBEDDED_WEIGHTS
from ...pipelines.precision import best_precision
from ...programs import program
from ...quiet import hide_known_warnings
from ...results.files import write_results
from ...results.machine import command_text
from ...training.signals import Interrupted
from ..measures.methods import METHODS, PEERS, is_trained, method_settings, split_rate
from ..measures.prompt_sets import PROMPT_SETS
from ..measures.shown import SHOWN_COUNTS, members
from ..measures.teaching import SCENES, TAUGHT_SUBJECTS, Lesson, Student
from .curves import page
from .lessons import Row, Task, Teacher, all_tasks, base_hash, compare
from .rates import next_rates
from .results import as_results
from .tables import report

DEFAULT_METHODS = ("base", "nora", "lora", "lora_r2")
DEFAULT_RATES = (2.4e-3, 4.8e-3, 9.6e-3)
DEFAULT_SEEDS = (0, 1, 2)
AUTO = "auto"


class LazyTeacher:
    """A classroom that is opened at its first lesson: a finished comparison needs none."""

    def __init__(self, weights: Path, precision: Any) -> None:
        self.weights, self.precision = weights, precision
        self.room: Teacher | None = None

    def teach(self, students: Sequence[Student]) -> list[Lesson]:
        """See :class:`Teacher`."""
        from ..measures.classroom import Classroom  # late: their imports log what main() silences first
        from ..measures.probes import Probes

        self.room = self.room or Classroom(self.weights, Probes(), self.precision)
        return self.room.teach(students)


def lessons(args: argparse.Namespace, teacher: Teacher) -> list[Row]:
    """All rows of the comparison; with ``--rates auto`` the rates of a method follow from its rows so far."""
    base = base_hash(args.weights)

    def tasks(methods: Sequence[str], rates: Sequence[float]) -> list[Task]:
        return all_tasks(
            methods, rates, args.seeds, args.subjects, steps=args.max_train_steps, precision=args.mixed_precision,
            shown=args.training_images, prompts=tuple(args.prompts),
        )  # fmt: skip

    if args.rates != [AUTO]:
        return compare(base, tasks(args.methods, rates_of(args.rates)), args.out, teacher, args.at_once)
    rows: list[Row] = []
    open_ended = [m for m in args.methods if split_rate(m)[1] is None and is_trained(m)]
    todo = [task for method in args.methods for task in tasks([method], next_rates([], method))]
    while todo:
        rows += compare(base, todo, args.out, teacher, args.at_once)
        todo = [task for m in open_ended for task in tasks([m], next_rates(rows, m))]
    return rows


def rates_of(texts: Sequence[str]) -> list[float]:
    """The rates as numbers. Raises :class:`UserError` for anything else."""
    try:
        return [float(text) for text in texts]
    except ValueError as error:
        raise UserError(f"--rates takes learning rates such as 6e-4 1.2e-3, or auto alone, not {texts}") from error


def build_parser() -> argparse.ArgumentParser:
    """The flags."""

    def default(values: Sequence[Any]) -> str:
        return f"(default: {' '.join(map(str, values))})"

    parser = argparse.ArgumentParser(prog="python -m nora_diffusion.tiny_sd.comparing", description=main.__doc__)
    parser.add_argument("--methods", nargs="+", default=DEFAULT_METHODS, metavar="METHOD[:KEY=VALUE,...][@RATE]",
                        help=f"of {', '.join((*METHODS, *PEERS))}, with settings, and a rate of its own in place "
                             f"of --rates {default(DEFAULT_METHODS)}")  # fmt: skip
    parser.add_argument("--rates", nargs="+", default=list(map(str, DEFAULT_RATES)), metavar="RATE",
                        help="learning rates, the same for every method; auto: doubled and halved for each method "
                             f"until its best is inside {default(DEFAULT_RATES)}")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=DEFAULT_SEEDS, metavar="SEED",
                        help=f"of training and images {default(DEFAULT_SEEDS)}")  # fmt: skip
    parser.add_argument("--subjects", nargs="+", default=TAUGHT_SUBJECTS, metavar="SUBJECT[+SUBJECT...]",
                        help="folder names of examples/subjects; those joined by + share one adapter, each with a "
                             f"trigger of its own {default(TAUGHT_SUBJECTS)}")  # fmt: skip
    parser.add_argument("--training_images", type=int, choices=SHOWN_COUNTS, default=6,
                        help="images of each subject to train on (default: %(default)s)")  # fmt: skip
    parser.add_argument("--prompts", nargs="*", choices=tuple(PROMPT_SETS), default=SCENES, metavar="SET",
                        help=f"sets of ten prompts, of {', '.join(PROMPT_SETS)}; with none, only the held-out "
                             f"loss is measured {default(SCENES)}")  # fmt: skip
    parser.add_argument("--max_train_steps", type=int, default=100, help="steps of each training (default: 100)")
    parser.add_argument("--at_once", type=int, default=8, help="adapters trained in one batch (default: %(default)s)")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default=best_precision(torch.device("cpu")),
                        help="precision of training and images (default here: %(default)s)")  # fmt: skip
    parser.add_argument("--weights", type=Path, default=EMBEDDED_WEIGHTS, help="folder of the base (default: shipped)")
    parser.add_argument("--out", type=Path, default=Path("outputs/comparing"),
                        help="folder for lessons, results, report and pictures (default: %(default)s)")  # fmt: skip
    return parser


@program
def main(argv: Sequence[str] | None = None, teacher: Teacher | None = None) -> int:
    """Train several methods on held-out subjects, over learning rates and seeds, and write a table of scores."""
    args = build_parser().parse_args(argv)
    hide_known_warnings()
    for method in args.methods:
        method_settings(split_rate(method)[0])  # refuses unknown ones
    for subject in args.subjects:
        members(subject)
    if args.at_once < 1:
        raise UserError(f"--at_once {args.at_once} is too few: give 1 or more")
    try:
        rows = lessons(args, teacher or LazyTeacher(args.weights, args.mixed_precision))
        text = report(rows)
        write_atomic(args.out / "report.md", text)
        write_atomic(args.out / "curves.html", page(rows))
        command = command_text("python -m nora_diffusion.tiny_sd.comparing", sys.argv[1:] if argv is None else argv)
        write_results(as_results(rows, args.weights, command, args.out.resolve().name), args.out / "results.json")
    except (Interrupted, KeyboardInterrupt) as stop:
        print("Stopped. Finished lessons are saved; run the same command again to continue.", file=sys.stderr)
        return stop.exit_code if isinstance(stop, Interrupted) else 128 + stop_signal(stop)
    print(f"\n{text}\nWrote {args.out / 'report.md'}, curves.html and results.json (see docs/benchmark.md).")
    return 0
