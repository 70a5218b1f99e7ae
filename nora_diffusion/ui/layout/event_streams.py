"""Keeps results of queued events from getting lost between two event streams of a page."""

from __future__ import annotations

import json
from collections import OrderedDict
from urllib.parse import parse_qs

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..security.sessions import MAX_SESSIONS

STREAM, JOIN = "/gradio_api/queue/data", "/gradio_api/queue/join"
CLOSE = b'"msg":"close_stream"'
ENDED = "x-stream-ended"
"""Header of the answer to an event that is queued after the end of the page's last stream."""


class EventStreams:
    """ASGI middleware against a race in Gradio's client, which made clicks do nothing.

    The client reads the results of all queued events of a page from one stream, and opens a new one for an event only
    if it has none. Gradio ends the stream after the last pending event. An event that is queued before the client has
    read that would wait for its result on an ended stream forever. So the answer to such an event says that the stream
    has ended; the page (``SCRIPT`` in ``theme.py``) gives it to the client when that has read the end of the stream.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._ended: OrderedDict[str, None] = OrderedDict()
        """Pages whose last stream has ended, oldest first."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == STREAM:
            await self._stream(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] == JOIN:
            await self._join(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        self._ended.pop(session, None)

        async def watched(message: Message) -> None:
            if CLOSE in message.get("body", b""):
                self._ended[session] = None
                if len(self._ended) > MAX_SESSIONS:
                    self._ended.popitem(last=False)
            await send(message)

        await self.app(scope, receive, watched)

    async def _join(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()

        async def copied() -> Message:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start" and self._ended and _session(bytes(body)) in self._ended:
                MutableHeaders(scope=message)[ENDED] = "1"
            await send(message)

        await self.app(scope, copied, marked)


def _session(body: bytes) -> str:
    try:
        return str(json.loads(body)["session_hash"])
    except (ValueError, KeyError, TypeError):
        return ""
