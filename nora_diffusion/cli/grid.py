"""``nora-diffusion grid``."""

from __future__ import annotations

import argparse

from .opening import add_opening_arguments

HELP = "compare pictures over adapter, weight, method, seed, step, steps, guidance or prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    values = "seed=1..4, weight=0,0.5,1 ... (axes: adapter, weight, method, seed, step, steps, guidance, prompt)"
    for name, what in (("x", f"columns: {values}"), ("y", "rows, likewise"), ("z", "sheets below each other")):
        parser.add_argument(f"--{name}", metavar="AXIS=VALUES", required=name == "x", help=what)
    parser.add_argument("--prompt", default="", help="what to show, unless an axis says it")
    parser.add_argument("--adapter", metavar="PATH[:WEIGHT]", help="adapter of all cells, unless an axis says it")
    parser.add_argument("--base", help="pipeline folder or hub id; without it the embedded base")
    parser.add_argument("--negative_prompt", default="", help="what to avoid")
    parser.add_argument("--seed", type=int, default=0, help="seed of all cells")
    parser.add_argument("--steps", type=int, help="denoising steps, 1 to 1000 (default: what suits the base)")
    parser.add_argument("--guidance", type=float, help="guidance scale, 0 to 100 (default: what suits the base)")
    parser.add_argument("--width", type=int, help="width in pixels, a multiple of 8 (default: the base's own)")
    parser.add_argument("--height", type=int, help="height in pixels, a multiple of 8 (default: the base's own)")
    parser.add_argument("--judge", help="CLIP folder or hub id; 'tiny' is the one of the embedded base")
    parser.add_argument("--references", help="folder of real pictures of the subject, for the subject score")
    parser.add_argument("--device", help="cpu, cuda, mps ... (default: the best there is)")
    add_opening_arguments(parser)
    parser.add_argument("--out", default="outputs/grid", help="folder of the grid; the same one goes on with it")


def run(values: argparse.Namespace) -> None:
    """Make the grid and say where it is."""
    from pathlib import Path

    from ..data import read_images
    from ..errors import UserError
    from ..evaluation.axes import Cell, parse_axis
    from ..evaluation.grid import NO_AXIS, GridConfig, run_grid
    from ..generation.generate import parse_adapter
    from ..scoring.judges import load_judge

    if values.references and not values.judge:
        raise UserError("--references needs --judge: a score needs somebody who scores")
    axes = {name: parse_axis(text) if (text := getattr(values, name)) else NO_AXIS for name in ("x", "y", "z")}
    adapter, weight = parse_adapter(values.adapter) if values.adapter else (None, 1.0)
    shared = {k: getattr(values, k) for k in ("prompt", "negative_prompt", "seed", "steps", "guidance")}
    if not shared["prompt"] and all(a.name != "prompt" for a in axes.values()):
        raise UserError("there is no prompt: give --prompt, or an axis prompt=...")
    cell = Cell(**shared, adapter=adapter, weight=weight, width=values.width, height=values.height)
    references = [p.image for p in read_images(Path(values.references).expanduser())] if values.references else []
    judge = load_judge(values.judge) if values.judge else None
    opening = {k: getattr(values, k) for k in ("base", "device", "dtype", "variant", "revision", "out")}
    config = GridConfig(cell, axes["x"], axes["y"], axes["z"], **opening)
    folder = run_grid(config, judge, references)
    print(f"{folder}/grid.png: {len(config.cells())} cells; settings and scores in {folder}/grid.json")
