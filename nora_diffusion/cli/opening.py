"""The flags of all commands that make pictures, for how their base is opened."""

from __future__ import annotations

import argparse

DTYPES = ("auto", "fp32", "fp16", "bf16")


def add_opening_arguments(parser: argparse.ArgumentParser) -> None:
    """``--dtype``, ``--variant`` and ``--revision``, the last two as `train` has them."""
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="number type of the base; auto is half precision on a GPU"
    )
    parser.add_argument("--variant", help="variant of the weight files, for example fp16")
    parser.add_argument("--revision", help="revision of the hub repository")
