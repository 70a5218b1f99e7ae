"""``nora-diffusion methods``."""

from __future__ import annotations

import argparse

HELP = "list the methods with formula, size and defaults on Stable Diffusion, and the strategies"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--method", nargs="+", help="methods to show (default: all)")
    parser.add_argument("--layout", nargs="+", help="sd15, sdxl (default: both)")


def run(values: argparse.Namespace) -> None:
    """Print the table as Markdown and, unless only some methods are asked for, the other lists."""
    from ..evaluation.method_costs import method_table
    from ..evaluation.method_lists import all_lists

    print(method_table(values.method, values.layout))
    if values.method is None:
        print(f"\n{all_lists()}")
