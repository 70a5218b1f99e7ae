"""``nora-diffusion demo``."""

from __future__ import annotations

import argparse

HELP = "train on an example subject with the embedded base, then generate images of it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    from ..demo import SUBJECT, example_names
    from ..training.settings.defaults import embedded_defaults

    parser.add_argument("--subject", default=SUBJECT, help="an example subject: " + ", ".join(example_names()))
    parser.add_argument("--out", default="outputs/demo", help="folder for the results")
    steps = embedded_defaults("nora")["max_train_steps"]
    parser.add_argument("--max_train_steps", type=int, default=steps, help="training steps")


def run(values: argparse.Namespace) -> None:
    """Run the demo and print its table."""
    from ..demo import run_demo, table
    from ..training.signals import Interrupted

    try:
        report = run_demo(values.subject, values.out, values.max_train_steps)
    except Interrupted as stop:  # a demo starts over, and does not resume
        raise stop.as_interrupt() from None
    print(table(report))
    print(f"\nimages: {values.out}/grid.png")
