"""An address to listen on, and a uvicorn server in a thread."""

from __future__ import annotations

import ipaddress
import socket
import threading
from typing import Any

from ..errors import UserError


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a server that listens on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises :class:`UserError` if the port is busy or the host not possible."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        raise UserError(f"port {port} on {host} is busy or not allowed: choose another --port") from error


def run_in_thread(server: Any, listener: socket.socket) -> threading.Thread:
    """Start a ``uvicorn.Server``; :func:`wait_until_started` is apart, so that a wait that fails can stop it."""
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="http", daemon=True)
    thread.start()
    return thread


def wait_until_started(server: Any, thread: threading.Thread) -> None:
    """Wait until the server answers. Raises :class:`UserError` if it ends instead."""
    while not server.started:
        thread.join(0.01)
        if not thread.is_alive():
            raise UserError("the server stopped while it was starting; the terminal shows why")
