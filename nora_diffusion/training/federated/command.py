"""``nora-diffusion federate``: its own flags, and all flags of ``nora-diffusion train`` for the clients' training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from ...programs import program
from ..command import set_up_logging
from ..settings.arguments import Parser, parse, with_underscores
from ..signals import Interrupted
from .settings import Aggregation, Federation

HELP = "train one adapter on the photos of several clients, which send their factors and never their photos"


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The flags besides those of ``train``."""
    parser = Parser(
        prog=prog, allow_abbrev=False, description=f"{HELP[0].upper()}{HELP[1:]}.",
        epilog="All flags of `nora-diffusion train` set the training of a client in one round: --method, --rank, "
        "--max_train_steps ... --output_dir is the folder of the federation.",
    )  # fmt: skip
    parser.add_argument(
        "--clients", required=True, help="YAML list: name, instance_data_dir and instance_prompt of each"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of training and averaging (default: 3)")
    parser.add_argument("--aggregation", choices=get_args(Aggregation), default="fair",
                        help="average: of the factors; exact: of the updates, cut to the rank; fair: average with "
                             "LoRA-FAIR's correction (default)")  # fmt: skip
    parser.add_argument("--address", help="Ray cluster, 'auto' or HOST:PORT (default: start one on this machine)")
    return parser


@program
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a federation and print its report."""
    set_up_logging()
    words = [with_underscores(word) for word in (sys.argv[1:] if argv is None else argv)]
    values, rest = build_parser(prog).parse_known_args(words)
    training = parse(rest, prog)
    if training.output_dir == type(training).output_dir:
        training = replace(training, output_dir="outputs/federated")
    federation = Federation(values.clients, training, values.rounds, values.aggregation, values.address)
    federation.configs()  # refuses mistakes before torch is imported
    from .report import report
    from .server import federate

    try:
        state = federate(federation)
    except Interrupted as stop:
        print(f"stopped after {stop.step} rounds: the same command continues", file=sys.stderr)
        return stop.exit_code
    print(f"{report(state)}\nWrote {federation.folder}.")
    return 0
