"""``nora-diffusion serve``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ...errors import UserError
from ..flags import add_source_flags, source_of

if TYPE_CHECKING:
    from ...serving.http.config import ServeConfig

HELP = "serve pictures of many subjects over HTTP"
PLAIN = (
    "host", "port", "uploads", "keys", "at_once", "resident", "host_memory", "waiting", "rate", "max_side", "max_steps",
    "timeout", "drain", "client_timeout", "connections", "log_prompts", "trace", "engine", "replicas", "address",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    from ...serving.http.config import EngineKind, ServeConfig

    own = ServeConfig()
    parser.add_argument(
        "--subjects", nargs="+", default=[], metavar="PATH", help="folders of adapters, packs and files of adapters"
    )
    parser.add_argument(
        "--host", default=own.host, help=f"address to listen on (default {own.host}); others need --keys"
    )
    parser.add_argument("--port", type=int, default=own.port, help=f"default {own.port}; 0: any free port")
    parser.add_argument("--keys", metavar="FILE", help="file of API keys, of which each request must send one")
    parser.add_argument("--new_key", metavar="NAME", help="add a key to the file --keys, print it, and end")
    parser.add_argument("--weight", type=float, metavar="W", help="of the new key: its share of the engine (default 1)")
    parser.add_argument("--quota", type=int, metavar="N", help="of the new key: pictures a day (default: any number)")
    parser.add_argument("--uploads", metavar="DIR", help="let clients upload adapters, into this folder")
    parser.add_argument("--at_once", type=int, default=own.at_once, help="pictures that share the passes at most")
    parser.add_argument("--resident", type=int, default=own.resident, help="subjects in the pipeline at most")
    parser.add_argument(
        "--host_memory", type=int, default=own.host_memory, help="MiB of memory for subjects that make room for others"
    )
    parser.add_argument("--waiting", type=int, default=own.waiting, help="pictures that wait at most; others get 429")
    parser.add_argument(
        "--rate", type=float, help=f"requests a minute of each key, or of the new one (default {own.rate:g})"
    )
    parser.add_argument("--max_side", type=int, default=own.max_side, help="largest width and height of a picture")
    parser.add_argument("--max_steps", type=int, default=own.max_steps, help="most steps of a picture")
    parser.add_argument("--timeout", type=float, default=own.timeout, help="seconds of a request that names none")
    parser.add_argument("--drain", type=float, default=own.drain, help="seconds to finish requests after a stop")
    parser.add_argument(
        "--client_timeout",
        type=float,
        default=own.client_timeout,
        help="seconds that a client may take to send a request",
    )
    parser.add_argument("--connections", type=int, default=own.connections, help="open connections at most")
    parser.add_argument("--log_prompts", action="store_true", help="write prompts into the log")
    parser.add_argument(
        "--trace", action="store_true", help="traces by OpenTelemetry, to where its environment variables say"
    )
    parser.add_argument(
        "--engine", choices=get_args(EngineKind), default=own.engine,
        help="make pictures in this process, or by replicas in a Ray cluster (extra 'ray')",
    )  # fmt: skip
    parser.add_argument("--replicas", default=own.replicas, metavar="N", help="of --engine ray; 1:4 for 1 to 4 by load")
    parser.add_argument("--address", help="Ray cluster, 'auto' or HOST:PORT (default: one on this machine)")
    add_source_flags(parser)


def run(values: argparse.Namespace) -> None:
    """Serve until Ctrl-C or SIGTERM, or make a key."""
    if values.new_key is not None:
        from ...serving.http.access.keys import new_key

        if not values.keys:
            raise UserError("--new_key needs --keys FILE, where its hash is kept")
        weight = 1.0 if values.weight is None else values.weight
        print(new_key(Path(values.keys).expanduser(), values.new_key, weight, values.rate, values.quota))
        return
    if values.weight is not None or values.quota is not None:
        raise UserError("--weight and --quota are of a new key: add --new_key NAME, or edit the file of keys")
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError("the server needs more packages: pip install 'nora-diffusion[serve]'") from error
    from ...serving.http.server import serve

    serve(serve_config(values))


def serve_config(values: argparse.Namespace) -> ServeConfig:
    """The flags as :class:`ServeConfig`."""
    from ...serving.http.config import ServeConfig

    given = {name: value for name in PLAIN if (value := getattr(values, name)) is not None}
    return ServeConfig(source_of(values), values.subjects, **given)
