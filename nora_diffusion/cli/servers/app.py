"""``nora-diffusion app``, also ``app.py``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..flags import add_source_flags, source_of

if TYPE_CHECKING:
    from ...ui import AppConfig

HELP = "generate, mix, train and compare in the browser"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    from ...ui import AppConfig

    defaults = AppConfig()
    parser.add_argument("--port", type=int, default=defaults.port, help=f"default {defaults.port}; 0: any free port")
    parser.add_argument(
        "--listen", default=defaults.listen, metavar="ADDRESS", help=f"default {defaults.listen}, this machine only"
    )
    parser.add_argument(
        "--library", default=defaults.library, metavar="DIR", help="folder of adapters, images and training runs"
    )
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="require a password; needed with --listen")
    parser.add_argument(
        "--allow_changes", action="store_true", help="with --listen: let users train, upload and delete"
    )
    parser.add_argument(
        "--server", metavar="URL", help="generate on a server (nora-diffusion serve) instead of this machine"
    )
    parser.add_argument(
        "--server_key", metavar="FILE", help="file with the key of that server (default: the variable NORA_SERVER_KEY)"
    )
    add_source_flags(parser)


def run(values: argparse.Namespace) -> None:
    """Serve the app until Ctrl-C."""
    from ...ui import serve

    serve(app_config(values))


def app_config(values: argparse.Namespace) -> AppConfig:
    """The flags as :class:`AppConfig`."""
    from ...ui import AppConfig

    return AppConfig(
        source_of(values), values.port, values.listen, values.library, values.auth, values.allow_changes, values.server,
        values.server_key,
    )  # fmt: skip
