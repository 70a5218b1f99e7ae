"""``nora-diffusion demo``."""

from __future__ import annotations

import argparse

HELP = "learn an example subject on the embedded base and generate it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    parser.add_argument("--subject", help="folder name in examples/subjects (default: stripemug-red)")
    parser.add_argument("--out", default="outputs/demo", help="folder for the results")
    parser.add_argument("--max_train_steps", type=int, help="training steps (default: 300)")


def run(values: argparse.Namespace) -> None:
    """Run the demo and print its table."""
    from ..demo import SUBJECT, run_demo, table

    report = run_demo(values.subject or SUBJECT, values.out, values.max_train_steps)
    print(table(report))
    print(f"\nlook at {values.out}/grid.png")
