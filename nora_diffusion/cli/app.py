"""``nora-diffusion app``, and what ``app.py`` does."""

from __future__ import annotations

import argparse

from .opening import add_opening_arguments

HELP = "generate, mix, train and compare in the browser"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    from ..ui import AppConfig

    first = AppConfig()
    parser.add_argument("--base", help="pipeline folder or hub id; without it the embedded base")
    parser.add_argument("--port", type=int, default=first.port, help=f"default {first.port}; 0 takes any free one")
    parser.add_argument(
        "--listen", default=first.listen, metavar="ADDRESS", help=f"default {first.listen}, this machine only"
    )
    parser.add_argument(
        "--library", default=first.library, metavar="DIR", help="folder of adapters, pictures and trainings"
    )
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask for a password; needed with --listen")
    parser.add_argument(
        "--allow_changes", action="store_true", help="with --listen: let users train, upload and delete"
    )
    parser.add_argument("--device", help="cpu, cuda, mps ... (default: the best there is)")
    add_opening_arguments(parser)


def run(values: argparse.Namespace) -> None:
    """Serve until Ctrl-C."""
    from ..ui import AppConfig, serve

    serve(AppConfig(**{k: v for k, v in vars(values).items() if k not in ("command", "run")}))
