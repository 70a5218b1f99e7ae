"""What stands between the network and the handlers: hosts, keys, rates, and the log."""

from __future__ import annotations

import ipaddress
import json
import logging
import time
from contextlib import ExitStack
from datetime import datetime, timezone
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answers import Refused, answer, refused
from .bodies import Bodies
from .document import OPEN, template
from .state import State

log = logging.getLogger("nora_diffusion.requests")


class Gate:
    """ASGI middleware around the app. ``document``: the description of its routes."""

    def __init__(self, app: ASGIApp, state: State, document: dict[str, Any]) -> None:
        self.app, self.state, self.document = app, state, document
        posts = {path for path, operations in document["paths"].items() if "post" in operations}
        self.bodies = Bodies(posts, state.catalog.uploads is not None, state.config.client_timeout)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket; there are none
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        span = self.state.tracing.begin(scope["method"], template(self.document, scope["path"]), headers)
        note, ending = _Note(send, scope, self.state.config.log_prompts), ExitStack()
        scope["state"] = {**scope.get("state", {}), "client": "", "ending": ending, "span": span}
        try:
            self._check(scope, headers)
            receive = await self.bodies.checked(scope, headers, receive, ending)
            await self.app(scope, receive, note.send)
        except Exception as error:
            if note.complete:  # answered and logged; starlette raises it once more
                return
            if note.status:  # too late for another answer
                raise
            await answer(refused(error))(scope, receive, note.send)
        finally:
            ending.close()
            self.state.metrics.answered(note.status or 499)
            self.state.tracing.finish(span, note.status or 499, scope["state"]["client"])
            note.write()

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        """Raises :class:`Refused` for a request that may not be answered, and notes whose it is."""
        if scope["path"] in OPEN:
            return
        if self.state.keys is None:
            _check_local(headers, self.state.config.host)
            return
        owner = self.state.owner(headers.get("authorization", ""))
        if owner is None:
            raise Refused(401, "the API key is missing or wrong: send Authorization: Bearer KEY")
        scope["state"]["client"] = owner.name
        if scope["method"] not in ("GET", "HEAD") and (wait := self.state.rates.wait(owner.name, owner.rate)):
            raise Refused(429, f"too many requests of the key {owner.name!r}: wait {wait:.1f} seconds", wait)


def _check_local(headers: dict[str, str], host: str) -> None:
    """Without keys only this machine is served: no page of a browser, not even under a name that leads here."""
    name = _host(f"//{headers.get('host', '')}")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        if name not in ("localhost", host):
            raise Refused(
                403, "unknown host name: use the address that the server printed, or start it with --keys"
            ) from None
    origin = headers.get("origin")
    foreign = origin is not None and _netloc(origin) != headers.get("host")
    if foreign or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise Refused(403, "requests from websites are refused: start the server with --keys to allow programs")


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _netloc(url: str) -> str:
    """Host and port of a URL; empty if it is malformed."""
    try:
        return urlsplit(url).netloc
    except ValueError:
        return ""


class _Note:
    """Notes the answer to a request, and writes one line of JSON about it; ``prompts``: with its prompts."""

    def __init__(self, send: Send, scope: Scope, prompts: bool) -> None:
        self._send, self._scope, self._prompts = send, scope, prompts
        self._began, self.status, self.complete = time.monotonic(), 0, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), (b"x-content-type-options", b"nosniff")]
        await self._send(message)
        self.complete = message["type"] == "http.response.body" and not message.get("more_body")

    def write(self) -> None:
        values = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "method": self._scope["method"], "path": self._scope["path"][:200], "status": self.status or 499,
            "seconds": round(time.monotonic() - self._began, 3),
            "client": self._scope.get("state", {}).get("client", ""),
        }  # fmt: skip
        if self._prompts and (request := self._scope.get("state", {}).get("request")):
            values |= {"prompt": request.prompt, "negative_prompt": request.sampling.negative_prompt}
        log.info(json.dumps(values))
