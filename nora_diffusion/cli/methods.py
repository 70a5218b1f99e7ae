"""``nora-diffusion methods``."""

from __future__ import annotations

import argparse

HELP = "list the methods with formula, size and defaults on Stable Diffusion"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--method", nargs="+", help="methods to show (default: all)")
    parser.add_argument("--layout", nargs="+", help="sd15, sdxl (default: both)")


def run(values: argparse.Namespace) -> None:
    """Print the table as Markdown."""
    from ..evaluation.method_costs import method_table

    print(method_table(values.method, values.layout))
