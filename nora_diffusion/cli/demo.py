"""``nora-diffusion demo``."""

from __future__ import annotations

import argparse

HELP = "learn an example subject on the embedded base and generate it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    from ..demo import SUBJECT
    from ..training.settings.defaults import EMBEDDED

    parser.add_argument("--subject", default=SUBJECT, help="folder name in examples/subjects")
    parser.add_argument("--out", default="outputs/demo", help="folder for the results")
    parser.add_argument("--max_train_steps", type=int, default=EMBEDDED["max_train_steps"], help="training steps")


def run(values: argparse.Namespace) -> None:
    """Run the demo and print its table."""
    from ..demo import run_demo, table

    report = run_demo(values.subject, values.out, values.max_train_steps)
    print(table(report))
    print(f"\nlook at {values.out}/grid.png")
