"""Checks of every request. Loopback is no protection: any web page can send requests to 127.0.0.1."""

from __future__ import annotations

import ipaddress
import math
import re
import socket
from collections.abc import Container, Iterable, Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..config import AppConfig
from .bodies import MAX_BODY, BadBodyError, checked_call, limited
from .headers import headers_for
from .login import Attempts
from .uploads import MAX_UPLOAD, UPLOAD

LOGIN = "/login"
CALLS = ("/gradio_api/queue/join", "/gradio_api/run/predict")
OPEN = {
    "/", "/config", "/theme.css", LOGIN, "/logout", "/favicon.ico", "/manifest.json", "/robots.txt", UPLOAD, *CALLS,
    "/gradio_api/upload_progress", "/gradio_api/queue/data", "/gradio_api/reset", "/gradio_api/startup-events",
}  # fmt: skip
OPEN_BELOW = ("/assets/", "/static/", "/svelte/", "/gradio_api/file=/", "/gradio_api/heartbeat/")
"""The routes of Gradio that the page uses, exact and by their beginning. All others answer 404."""
REMOVED = re.compile(rb"(x-)?forwarded.*|range", re.IGNORECASE)
"""Request headers that are removed. Gradio takes the page's address from ``X-Forwarded-Host``; it answers a request for
a range of a file with a copy of the request's headers."""


class Refusal(NamedTuple):
    """The answer to a request that is refused: HTTP status, reason, seconds to wait before the next try."""

    status: int
    reason: str
    wait: int = 0


class Gatekeeper:
    """ASGI middleware: 400 for an unknown ``Host`` (DNS rebinding), 403 for a request from another site, 404 for unused
    routes, 411 and 413 for a body without a length or over its limit, 429 after too many wrong passwords. Adds the
    security headers to every response. ``functions`` are the indices of the page's handlers."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str], functions: Container[int] = ()) -> None:
        self.app = app
        self.hosts, self.functions = frozenset(hosts), functions
        self.attempts = Attempts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket; the page has none
            await send({"type": "websocket.close", "code": 1008})
            return
        send = _with_headers(send, scope["path"])
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        refusal = self.refusal(scope, headers)
        if refusal is not None:
            await _respond(send, refusal)
            return
        scope["headers"] = [(k, v) for k, v in scope["headers"] if not REMOVED.fullmatch(k)]
        receive = limited(receive, _limit(scope["path"]))
        if scope["path"] == LOGIN:
            send = self._noting_success(send, _address(scope))
        if scope["path"] in CALLS and scope["method"] == "POST":
            try:
                receive = await checked_call(receive, self.functions)
            except BadBodyError as error:
                await _respond(send, Refusal(400, str(error)))
                return
        await self.app(scope, receive, send)

    def refusal(self, scope: Scope, headers: Mapping[str, str]) -> Refusal | None:
        """The refusal of a request, or None if the app may answer it."""
        path, method = scope["path"], scope.get("method", "GET")
        if not self.known_host(headers.get("host", "")):
            return Refusal(400, "unknown host name: open the app at the address that it printed")
        if not _same_site(headers, method, path):
            return Refusal(403, "requests from other websites are refused")
        if path not in OPEN and not path.startswith(OPEN_BELOW):
            return Refusal(404, "not part of this app")
        if (refusal := _body_refusal(path, method, headers)) is not None:
            return refusal
        if path == LOGIN and method == "POST" and (wait := math.ceil(self.attempts.start(_address(scope)))):
            return Refusal(429, f"too many wrong passwords: try again in {wait} seconds", wait)
        return None

    def known_host(self, host: str) -> bool:
        """Accept known names, and every IP address: DNS rebinding needs a name."""
        name = _split(f"//{host}")[1]
        try:
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return name in self.hosts

    def _noting_success(self, send: Send, address: str) -> Send:
        async def note(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                self.attempts.succeed(address)
            await send(message)

        return note


def _body_refusal(path: str, method: str, headers: Mapping[str, str]) -> Refusal | None:
    """Refuse a body that is too large. An upload has to announce its length, for the room that it needs on the disk."""
    limit, length = _limit(path), headers.get("content-length")
    if length is None:
        needed = path == UPLOAD and method == "POST"
        return Refusal(411, "an upload needs a content-length") if needed else None
    if not re.fullmatch(r"[0-9]{1,15}", length) or int(length) > limit:
        return Refusal(413, f"the request is too large: send at most {limit // 2**20} MiB at a time")
    return None


def _limit(path: str) -> int:
    return MAX_UPLOAD if path == UPLOAD else MAX_BODY


def _same_site(headers: Mapping[str, str], method: str, path: str) -> bool:
    origin = headers.get("origin")
    if origin is not None and _split(origin)[0] != headers.get("host"):
        return False
    site = headers.get("sec-fetch-site", "none")
    link = method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate" and path == "/"
    in_a_tab = headers.get("sec-fetch-dest", "document") == "document"
    return site in ("none", "same-origin") or (link and in_a_tab)


def _split(url: str) -> tuple[str, str]:
    """Network location (with port) and host name of a URL; both empty if it is malformed."""
    try:
        parts = urlsplit(url)
        return parts.netloc, parts.hostname or ""
    except ValueError:
        return "", ""


def _address(scope: Scope) -> str:
    return str((scope.get("client") or ("unknown",))[0])


def _with_headers(send: Send, path: str) -> Send:
    async def add(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *headers_for(path)]
        await send(message)

    return add


async def _respond(send: Send, refusal: Refusal) -> None:
    body = refusal.reason.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    headers += [(b"retry-after", str(refusal.wait).encode())] if refusal.wait else []
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def known_hosts(config: AppConfig) -> set[str]:
    """Host names that the app answers to."""
    names = {"localhost", config.listen}
    return names if config.on_loopback else names | {socket.gethostname(), socket.getfqdn()}
