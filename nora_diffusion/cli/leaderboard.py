"""``nora-diffusion leaderboard``."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "rank the methods of results files: a table for each protocol, and curves"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("files", nargs="+", metavar="RESULTS.json", help="results files, see docs/benchmark.md")
    parser.add_argument("--reference", default="lora", help="the method to compare with; the best one if it is missing")
    parser.add_argument("--out", default="outputs/leaderboard", help="folder for leaderboard.md and leaderboard.html")


def run(values: argparse.Namespace) -> None:
    """Write and print the tables."""
    from ..results.leaderboard import read_all, write_leaderboard

    out = Path(values.out).expanduser()
    text = write_leaderboard(read_all([Path(name).expanduser() for name in values.files]), out, values.reference)
    print(f"{text}\n{out / 'leaderboard.html'}: the same with curves")
