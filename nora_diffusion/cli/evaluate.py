"""``nora-diffusion evaluate``."""

from __future__ import annotations

import argparse

from .flags import add_sampling_flags, add_source_flags, sampling_of, source_of

HELP = "score adapters by the DreamBooth protocol: DINO, CLIP-I, CLIP-T and diversity, as JSON and an HTML page"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument(
        "--adapters", nargs="+", metavar="[LABEL=]PATH[:WEIGHT]", required=True,
        help="the rows of the table; {subject} is replaced by the subject's name; the base alone is always included",
    )  # fmt: skip
    parser.add_argument("--subjects", nargs="+", metavar="FOLDER", required=True, help="folders of real images")
    parser.add_argument(
        "--prompts",
        help="object or live (DreamBooth), extended (our own, of three kinds), or a text file with {} for the subject "
        "(default: the subject's, else object)",
    )
    parser.add_argument("--seeds", type=int, default=4, help="images per prompt, 1 to 100, with the seeds 0, 1 ...")
    parser.add_argument("--judge", help="CLIP folder or hub id (default for the embedded base: its tiny CLIP)")
    parser.add_argument("--dino", help="vision model folder or hub id, for example facebook/dinov2-base")
    parser.add_argument(
        "--weight_noise", type=float, nargs="+", metavar="LEVEL", default=[],
        help="also measure the held-out loss with noise on the frozen weights, for example 0.01 0.02: standard "
        "deviations relative to the largest weight of each layer",
    )  # fmt: skip
    add_sampling_flags(parser)
    add_source_flags(parser)
    parser.add_argument("--out", default="outputs/evaluation", help="output folder; images in it are reused")


def run(values: argparse.Namespace) -> None:
    """Evaluate, print the table and the paths of the reports."""
    from ..evaluation.settings import EvaluationConfig, check_evaluation

    config = EvaluationConfig(
        values.adapters, values.subjects, sampling_of(values), source_of(values), values.prompts, values.seeds,
        values.judge, values.dino, values.out, values.weight_noise,
    )  # fmt: skip
    check_evaluation(config)  # fails before torch is imported
    from ..evaluation.protocol import evaluate
    from ..evaluation.report import write_reports
    from ..evaluation.results import as_results
    from ..evaluation.scoreboard import noise_rows, rows_of, summarize
    from ..results.files import write_results
    from ..results.machine import command_text

    board = evaluate(config)
    page = write_reports(board)
    write_results(as_results(board, command_text("nora-diffusion", values.words)), page.parent / "results.json")
    print(f"{'':<20}" + "".join(f"{name:>24}" for name in board.metrics))
    for label, *scores in rows_of(summarize(board), board.metrics):
        print(f"{label:<20}" + "".join(f"{score:>24}" for score in scores))
    for label, *losses in noise_rows(board):
        print(f"{label:<24}" + "".join(f"{loss:>12}" for loss in losses))
    print(
        f"{page}: the same with images; all scores in {page.parent}/evaluation.json, for a leaderboard in results.json"
    )
