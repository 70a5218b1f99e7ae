"""Runs coroutines in tests, and waits for other threads."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of ``coroutine``, which runs in an event loop of its own.

    In a thread: an open browser of the tests of the app keeps an event loop running in this one, where a second one
    may not be run.
    """
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, coroutine).result()  # noqa: TID251


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does; without a limit, as the test's own is that of its runner."""
    while not condition():
        time.sleep(0.01)


def leave(app: Any, path: str, values: dict[str, Any]) -> None:
    """Send JSON to an ASGI app as a client that then closes the connection."""
    messages = [{"type": "http.request", "body": json.dumps(values).encode()}, {"type": "http.disconnect"}]
    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")], "http_version": "1.1",
        "scheme": "http", "server": ("localhost", 80), "client": ("127.0.0.1", 1), "asgi": {"spec_version": "2.3"},
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return messages.pop(0) if len(messages) > 1 else messages[0]

    async def send(message: dict[str, Any]) -> None:
        pass

    run(app(scope, receive, send))
