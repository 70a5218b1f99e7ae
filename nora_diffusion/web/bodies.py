"""Bodies of requests that are read before the app reads them."""

from __future__ import annotations

from starlette.types import Message, Receive

MIN_RATE = 2**14
"""Bytes a second that a client sends and reads at least."""


def replayed(body: bytes, receive: Receive) -> Receive:
    """The messages of a request whose ``body`` has been read already: first the body, then those of ``receive``."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
