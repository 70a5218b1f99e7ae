"""Bodies of requests: their size, their form, their pace, and how much of them is in memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any

from fastapi.concurrency import run_in_threadpool
from starlette.types import Message, Receive, Scope

from ...io.untrusted import parse_json
from ...web.bodies import MIN_RATE, replayed
from .answers import Refused
from .attachments import MAX_BASE64
from .uploads import MAX_UPLOAD

MAX_BODY = 2**20
"""Largest JSON body in bytes, besides the adapters in it."""
MAX_HELD = 2**28
"""Bytes of all JSON bodies that are in memory; each stays there until its request is answered."""
MAX_VALUES = 1000
SUBJECTS, PICTURES = "/v1/subjects/", "/v1/pictures"


class Bodies:
    """Reads and checks the bodies of requests.

    ``posts``: the routes that take JSON. ``attachments``: whether adapters may come with a request. ``patience``:
    seconds that a client may be late, see :func:`timely`.
    """

    def __init__(self, posts: Collection[str], attachments: bool, patience: float) -> None:
        self._posts, self._attachments, self._patience, self._held = posts, attachments, patience, 0

    async def checked(self, scope: Scope, headers: Mapping[str, str], receive: Receive, ending: ExitStack) -> Receive:
        """The messages for the app. Raises :class:`Refused`. ``ending``: when the request has been answered."""
        upload = scope["method"] == "PUT" and scope["path"].startswith(SUBJECTS)
        limit = MAX_UPLOAD if upload else MAX_BODY
        if self._attachments and scope["path"] == PICTURES:
            limit += MAX_BASE64
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit() and len(length) < 16):
            raise Refused(400, "the content-length is not a number")
        if int(length) > limit:
            raise _too_large(limit)
        receive = timely(receive, self._patience)
        if scope["method"] != "POST" or scope["path"] not in self._posts:  # an upload, or a body that nobody reads
            return receive
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "the body must be JSON: send Content-Type: application/json")
        body = await self._read(receive, limit, ending)
        if len(body) > MAX_BODY:
            await run_in_threadpool(_check_object, body)
        else:
            _check_object(body)
        return replayed(body, receive)

    async def _read(self, receive: Receive, limit: int, ending: ExitStack) -> bytes:
        chunks, size, more = list[bytes](), 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(499, "the body did not arrive completely")
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size > limit:
                raise _too_large(limit)
            self._hold(len(chunk), ending)
            chunks.append(chunk)
        return b"".join(chunks)

    def _hold(self, size: int, ending: ExitStack) -> None:
        if self._held + size > MAX_HELD:
            raise Refused(503, "the server is busy with large requests: try again later", 5)
        self._held += size
        ending.callback(self._release, size)

    def _release(self, size: int) -> None:
        self._held -= size


def timely(receive: Receive, patience: float) -> Receive:
    """Raises :class:`Refused` for a body whose bytes come more slowly than :data:`MIN_RATE`, but for ``patience``."""
    began, received, complete = time.monotonic(), 0, False

    async def read() -> Message:
        nonlocal received, complete
        if complete:
            return await receive()  # waits for the client to disconnect
        left = began + patience + received / MIN_RATE - time.monotonic()
        try:
            message = await asyncio.wait_for(receive(), max(left, 0))
        except asyncio.TimeoutError:
            raise Refused(408, "the body came too slowly: send it at once") from None
        received += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        return message

    return read


def _too_large(limit: int) -> Refused:
    return Refused(413, f"the body is too large: send at most {limit >> 20} MiB")


def _check_object(body: bytes) -> None:
    try:
        value: Any = parse_json(body, MAX_VALUES)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not valid JSON: {str(error)[:200] or 'it is damaged'}") from None
    if not isinstance(value, dict):
        raise Refused(400, "the body is not a JSON object")
