"""``nora-diffusion grid``."""

from __future__ import annotations

import argparse

from .flags import add_sampling_flags, add_source_flags, sampling_of, source_of

HELP = "compare images over adapter, weight, method, seed, step, steps, guidance or prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    values = "seed=1..4, weight=0,0.5,1 ... (axes: adapter, weight, method, seed, step, steps, guidance, prompt)"
    for name, what in (
        ("x", f"columns: {values}"),
        ("y", "rows, same format"),
        ("z", "further sheets below, same format"),
    ):
        parser.add_argument(f"--{name}", metavar="AXIS=VALUES", required=name == "x", help=what)
    parser.add_argument("--prompt", default="", help="prompt, unless an axis sets it")
    parser.add_argument("--adapter", metavar="PATH[:WEIGHT]", help="adapter of all cells, unless an axis sets it")
    parser.add_argument("--seed", type=int, default=0, help="seed of all cells")
    parser.add_argument("--judge", help="CLIP folder or hub id to score with; 'tiny' is that of the embedded base")
    parser.add_argument("--references", help="folder of real images of the subject, for the subject score")
    parser.add_argument("--negative_prompt", default="", help="what to avoid")
    add_sampling_flags(parser)
    add_source_flags(parser)
    parser.add_argument("--out", default="outputs/grid", help="output folder; cells in it are reused")


def run(values: argparse.Namespace) -> None:
    """Make the grid and print where it is."""
    from pathlib import Path

    from ..data import Pixels, read_images
    from ..errors import UserError
    from ..evaluation.axes import Cell, parse_axis
    from ..evaluation.settings import NO_AXIS, GridConfig
    from ..generation.addresses import parse_adapter

    if values.references and not values.judge:
        raise UserError("--references needs --judge: give the CLIP that scores")
    axes = {name: parse_axis(text) if (text := getattr(values, name)) else NO_AXIS for name in ("x", "y", "z")}
    adapter, weight = parse_adapter(values.adapter) if values.adapter else (None, 1.0)
    if not values.prompt and all(a.name != "prompt" for a in axes.values()):
        raise UserError("there is no prompt: give --prompt, or an axis prompt=...")
    cell = Cell(sampling_of(values, values.negative_prompt), values.prompt, adapter, weight, seed=values.seed)
    references = Pixels(read_images(Path(values.references).expanduser()) if values.references else [])
    config = GridConfig(cell, axes["x"], axes["y"], axes["z"], source_of(values), values.out)
    config.adapters()  # fails before torch is imported
    from ..evaluation.grid import run_grid
    from ..scoring.judges import load_judge

    judge = load_judge(values.judge) if values.judge else None
    folder = run_grid(config, judge, references)
    print(f"{folder}/grid.png: {len(config.cells())} cells; settings and scores in {folder}/grid.json")
