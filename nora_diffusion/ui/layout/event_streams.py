"""Keeps results of queued events from getting lost between two event streams of a page."""

from __future__ import annotations

import asyncio
import contextlib
import json
from urllib.parse import parse_qs

from starlette.types import ASGIApp, Message, Receive, Scope, Send

STREAM, JOIN = "/gradio_api/queue/data", "/gradio_api/queue/join"
CLOSE = b'"msg":"close_stream"'
PATIENCE = 3.0
"""Maximum seconds to wait until a client ends a stream."""


class EventStreams:
    """ASGI middleware against a race in Gradio's client, which made clicks do nothing.

    The client reads the results of all queued events of a page from one stream, and opens a new one for an event only
    if it has none. Gradio closes the stream after the last pending event. An event that is queued before the client has
    read that would wait for its result on a closed stream forever. So the connection of a closed stream stays open
    until the client ends it, which it does after reading ``close_stream``; until then the answers to the page's new
    events are held back.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._closing: dict[str, asyncio.Event] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == STREAM:
            await self._stream(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] == JOIN:
            await self._join(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        ended = asyncio.Event()

        async def watched(message: Message) -> None:
            if CLOSE in message.get("body", b""):
                self._closing[session] = ended
            elif self._closing.get(session) is ended and not message.get("more_body"):
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(_disconnected(receive), PATIENCE)
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            ended.set()
            if self._closing.get(session) is ended:
                del self._closing[session]

    async def _join(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()

        async def copied() -> Message:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        async def held(message: Message) -> None:
            if message["type"] == "http.response.start" and self._closing:
                ended = self._closing.get(_session(bytes(body)))
                if ended is not None:
                    await ended.wait()
            await send(message)

        await self.app(scope, copied, held)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _session(body: bytes) -> str:
    try:
        return str(json.loads(body)["session_hash"])
    except (ValueError, KeyError, TypeError):
        return ""
