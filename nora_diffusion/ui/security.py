"""Request checks, limits and passwords. Loopback is no protection: any web page can send requests to 127.0.0.1."""

from __future__ import annotations

import hmac
import ipaddress
import os
import socket
import stat
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .config import AppConfig

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Message, Receive, Send], Awaitable[None]]

MAX_UPLOAD = 512 * 2**20
"""Largest body of an upload in bytes, all files of the request together."""
MAX_BODY = 2**20
"""Largest body of any other request in bytes."""
MAX_STORED = 4 * 2**30
MAX_STORED_FILES = 5000
"""Limits of the temporary folder: bytes and files."""
TRIES, TRIES_SECONDS = 8, 60.0
"""Wrong passwords accepted in a time window; then every password is refused until the window has passed."""
UPLOAD = "/gradio_api/upload"
CLOSED = (
    "/monitoring", "/gradio_api/proxy=", "/gradio_api/cancel", "/gradio_api/call",
    "/gradio_api/api/", "/gradio_api/stream/", "/gradio_api/process_recording", "/gradio_api/vibe",
    "/gradio_api/undo-vibe", "/gradio_api/dev", "/gradio_api/deep_link", "/gradio_api/runs", "/gradio_api/run-history",
)  # fmt: skip
"""Routes of Gradio that this app does not use. They answer 404."""


class Gatekeeper:
    """ASGI middleware: 400 for an unknown ``Host`` (DNS rebinding), 403 for a request from another site, 404 for unused
    routes, 413 for a body over its limit, 507 if the temporary folder is full."""

    def __init__(self, app: Asgi, hosts: Iterable[str], storage: Path) -> None:
        self.app = app
        self.hosts = frozenset(hosts)
        self.storage = storage

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        refusal = self.refusal(scope, headers)
        if refusal is None:
            limit = MAX_UPLOAD if scope["path"].startswith(UPLOAD) else MAX_BODY
            await self.app(scope, _limited(receive, limit), send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _respond(send, *refusal)

    def refusal(self, scope: Message, headers: Mapping[str, str]) -> tuple[int, str] | None:
        """HTTP status and reason if the request is refused, else None."""
        path, method = scope["path"], scope.get("method", "GET")
        if not self.known_host(headers.get("host", "")):
            return 400, "unknown host name: open the app at the address that it printed"
        if not _same_site(headers, method):
            return 403, "requests from other websites are refused"
        if path.startswith(CLOSED):
            return 404, "not part of this app"
        limit = MAX_UPLOAD if path.startswith(UPLOAD) else MAX_BODY
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > limit:
            return 413, f"the request is too large: send at most {limit // 2**20} MiB at a time"
        if path.startswith(UPLOAD) and _full(self.storage):
            return 507, "the app's temporary folder is full: restart the app"
        return None

    def known_host(self, host: str) -> bool:
        """Accept known names, and every IP address: DNS rebinding needs a name."""
        name = urlsplit(f"//{host}").hostname or ""
        try:
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return name in self.hosts


def _same_site(headers: Mapping[str, str], method: str) -> bool:
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        return False
    site = headers.get("sec-fetch-site", "none")
    navigates = method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
    return site in ("none", "same-origin") or navigates


def _limited(receive: Receive, limit: int) -> Receive:
    """Stop reading after ``limit`` bytes, as if the client had disconnected: a header may understate the length."""
    seen = 0

    async def read() -> Message:
        nonlocal seen
        message = await receive()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > limit:
                return {"type": "http.disconnect"}
        return message

    return read


async def _respond(send: Send, status: int, text: str) -> None:
    body = text.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _full(folder: Path) -> bool:
    count = size = 0
    for file in folder.rglob("*"):
        try:
            found = file.lstat()
        except OSError:
            continue
        if stat.S_ISDIR(found.st_mode):  # Gradio deletes old files but leaves their folders behind
            continue
        count, size = count + 1, size + found.st_size
        if count > MAX_STORED_FILES or size > MAX_STORED:
            return True
    return False


def known_hosts(config: AppConfig) -> set[str]:
    """Host names that the app answers to."""
    names = {"localhost", config.listen}
    return names if config.on_loopback else names | {socket.gethostname(), socket.getfqdn()}


class Password:
    """Gradio's ``auth`` function: one user, compared in constant time, one limit on wrong tries for all clients."""

    def __init__(self, user: str, password: str) -> None:
        self._expected = (user.encode(), password.encode())
        self._wrong: list[float] = []
        self._lock = threading.Lock()

    def __call__(self, user: str, password: str) -> bool:
        with self._lock:
            now = time.monotonic()
            self._wrong = [t for t in self._wrong if now - t < TRIES_SECONDS]
            if len(self._wrong) >= TRIES:
                return False
            same = [hmac.compare_digest(a, b.encode()) for a, b in zip(self._expected, (user, password), strict=True)]
            if not all(same):
                self._wrong.append(now)
            return all(same)


def clean_environment(scratch: Path) -> None:
    """Remove all ``GRADIO_*`` environment variables, which could undo these defaults, and set our own.

    Call it before gradio is imported.
    """
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= {
        "GRADIO_TEMP_DIR": str(scratch),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SSR_MODE": "False",
        "GRADIO_SHARE": "False",
        "GRADIO_MCP_SERVER": "False",
        "GRADIO_RUN_HISTORY": "False",
    }
