"""``nora-diffusion app``, and what ``app.py`` does."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .flags import add_source_flags, source_of

if TYPE_CHECKING:
    from ..ui import AppConfig

HELP = "generate, mix, train and compare in the browser"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    from ..ui import AppConfig

    first = AppConfig()
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
    add_source_flags(parser)


def run(values: argparse.Namespace) -> None:
    """Serve until Ctrl-C."""
    from ..ui import serve

    serve(app_config(values))


def app_config(values: argparse.Namespace) -> AppConfig:
    """The settings that the flags give."""
    from ..ui import AppConfig

    return AppConfig(source_of(values), values.port, values.listen, values.library, values.auth, values.allow_changes)
