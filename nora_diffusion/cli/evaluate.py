"""``nora-diffusion evaluate``."""

from __future__ import annotations

import argparse

from .flags import add_sampling_flags, add_source_flags, sampling_of, source_of

HELP = "score adapters by the DreamBooth protocol: DINO, CLIP-I, CLIP-T and diversity, as JSON and one page"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    parser.add_argument(
        "--adapters", nargs="+", metavar="[LABEL=]PATH[:WEIGHT]", required=True,
        help="the table's rows; {subject} stands for the subject's name; the base alone takes part anyway",
    )  # fmt: skip
    parser.add_argument("--subjects", nargs="+", metavar="FOLDER", required=True, help="folders of real pictures")
    parser.add_argument(
        "--prompts",
        help="object, live, or a text file of prompts with {} for the subject (default: its own, else object)",
    )
    parser.add_argument(
        "--seeds", type=int, default=4, help="pictures of each prompt, 1 to 100, with the seeds 0, 1 ..."
    )
    parser.add_argument("--judge", help="CLIP folder or hub id (default on the embedded base: its tiny one)")
    parser.add_argument("--dino", help="vision model folder or hub id, for example facebook/dinov2-base")
    add_sampling_flags(parser)
    add_source_flags(parser)
    parser.add_argument("--out", default="outputs/evaluation", help="folder; the same one goes on with it")


def run(values: argparse.Namespace) -> None:
    """Evaluate, print the table and say where the reports are."""
    from ..evaluation.protocol import EvaluationConfig, evaluate
    from ..evaluation.report import write_reports
    from ..evaluation.scoreboard import rows_of, summarize

    config = EvaluationConfig(
        values.adapters, values.subjects, sampling_of(values), source_of(values), values.prompts, values.seeds,
        values.judge, values.dino, values.out,
    )  # fmt: skip
    board = evaluate(config)
    place = write_reports(board)
    print(f"{'':<20}" + "".join(f"{name:>24}" for name in board.metrics))
    for label, *numbers in rows_of(summarize(board), board.metrics):
        print(f"{label:<20}" + "".join(f"{number:>24}" for number in numbers))
    print(f"{place}: the same with pictures; all scores in {place.parent}/evaluation.json")
