"""``nora-diffusion mix``."""

from __future__ import annotations

import argparse
import sys
import warnings

HELP = "mix several adapters into one, without loading their base"
MODES = ("linear", "cat", "svd", "magnitude_prune", "ties", "dare_linear", "dare_ties")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("adapters", nargs="+", metavar="PATH[:WEIGHT]", help="adapter files or folders")
    parser.add_argument("--output", "--out", required=True, help="folder to write")
    parser.add_argument("--mode", choices=MODES, default="cat", help="see docs/mixing.md (default: cat, exact)")
    parser.add_argument("--rank", type=int, help="rank of the result, for modes that truncate (default: the sum)")
    parser.add_argument(
        "--density",
        type=float,
        default=0.5,
        help="share of entries that magnitude_prune, ties and dare keep, above 0 up to 1",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the entries that dare drops")


def run(values: argparse.Namespace) -> None:
    """Mix, and print the rank, the error and the overlaps."""
    from ..formats.adapter_file import inspect_adapter
    from ..generation.addresses import parse_adapter

    adapters = [parse_adapter(text) for text in values.adapters]
    for path, _ in adapters:
        inspect_adapter(path, hashed=False)  # fails before torch is imported
    from ..composition.mixing import mix_files

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # printed below
        report = mix_files(
            adapters, values.output, values.mode, rank=values.rank, density=values.density, seed=values.seed
        )
    exact = "exact" if report.error == 0 else f"error {report.error:.1%}, {report.kept:.2%} of the energy kept"
    print(f"{report.info.path}: {report.mode}, rank {report.rank} on {report.layers} layers, {exact}")
    for (one, two), score in report.overlaps.items():
        print(f"overlap of {one} and {two}: {score:.2f}")
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
