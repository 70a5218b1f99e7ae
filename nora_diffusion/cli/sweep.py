"""``nora-diffusion sweep``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "train every combination of settings in a YAML file, and compare the results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("file", metavar="SWEEP.yaml", help="settings and axes, see docs/training.md")
    parser.add_argument("--out", default="outputs/sweep", help="folder with a folder for each cell, and the results")
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine")
    parser.add_argument("--at_once", type=int, default=4, help="cells that share forward passes in one process")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="where the cells are trained")
    parser.add_argument("--address", help="Ray cluster, 'auto' or HOST:PORT (default: start one on this machine)")
    parser.add_argument("--list", action="store_true", help="print the cells and train nothing")


def run(values: argparse.Namespace) -> None:
    """Train the missing cells, write the results, and print where they are."""
    from ..errors import UserError
    from ..training.sweeps.cells import read_cells

    file, out = Path(values.file).expanduser(), Path(values.out).expanduser()
    for name in ("workers", "at_once"):
        if getattr(values, name) < 1:
            raise UserError(f"--{name}={getattr(values, name)} must be at least 1")
    cells = read_cells(file)
    if values.list:
        print("\n".join(cell.name for cell in cells))
        return
    from ..results.machine import command_text
    from ..training.signals import Interrupted
    from ..training.sweeps.results import REPORT, write_results
    from ..training.sweeps.run import run_sweep

    try:
        errors = run_sweep(
            cells, out, workers=values.workers, at_once=values.at_once, engine=values.engine, address=values.address
        )
    except Interrupted as stop:
        print("the same command continues the sweep", file=sys.stderr)
        raise stop.as_interrupt() from None
    rows = write_results(file.stem, cells, out, command_text("nora-diffusion", values.words))
    print(f"{len(rows)} of {len(cells)} cells are finished: {out / REPORT}")
    if errors:
        raise UserError("\n".join(errors))
