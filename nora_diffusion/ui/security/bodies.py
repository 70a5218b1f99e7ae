"""Limits on request bodies: size, pauses, and what a call may contain."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Container
from typing import Any

from starlette.types import Message, Receive

from ...web.bodies import replayed

MAX_BODY = 2**20
"""Largest body in bytes of a request that is not an upload."""
PAUSE_SECONDS = 30.0
"""Longest pause between two pieces of a body."""
MAX_SESSION = 128
"""Longest session name in characters. The page sends 11."""


class BadBodyError(ValueError):
    """A body that is refused; the message says why."""


def limited(receive: Receive, limit: int) -> Receive:
    """Stop reading after ``limit`` bytes or a long pause, as if the client had disconnected."""
    seen, complete = 0, False

    async def read() -> Message:
        nonlocal seen, complete
        if complete:
            return await receive()  # waits for the client to disconnect
        try:
            message = await asyncio.wait_for(receive(), PAUSE_SECONDS)
        except asyncio.TimeoutError:
            message = {"type": "http.disconnect"}
        seen += len(message.get("body", b""))
        if seen > limit:
            message = {"type": "http.disconnect"}
        complete = not message.get("more_body", False)
        return message

    return read


async def checked_call(receive: Receive, functions: Container[int]) -> Receive:
    """Read the JSON body of a call to a handler and check it. Returns the stream of messages for the app.

    ``functions``: the indices of the page's handlers. Raises :class:`BadBodyError`.
    """
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadBodyError("the request did not arrive completely")
        body, more = body + message.get("body", b""), message.get("more_body", False)
    check_call(body, functions)
    return replayed(body, receive)


def check_call(body: bytes, functions: Container[int]) -> None:
    """Raise :class:`BadBodyError` for anything but a JSON object that names a handler, and files uploaded to this app.

    Gradio would download a file that is given by its URL.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadBodyError("the request is not valid JSON") from error
    if not isinstance(values, dict):
        raise BadBodyError("the request is not a JSON object")
    index = values.get("fn_index")
    if type(index) is not int or index not in functions:
        raise BadBodyError("the page has no such function: reload it")
    if len(str(values.get("session_hash"))) > MAX_SESSION:
        raise BadBodyError("the session name is too long")
    rest: list[Any] = [values]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            if "://" in str(value.get("path", "")):
                raise BadBodyError("a file has to be uploaded; a URL is not accepted")
            rest.extend(value.values())
        elif isinstance(value, list):
            rest.extend(value)
