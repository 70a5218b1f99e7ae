"""A request for pictures at work: its events arrive in a thread, so that it can be cancelled while nothing arrives."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .events import Event, Lines, event_from
from .failures import failure, gone, odd, refusal

if TYPE_CHECKING:
    import httpx

MAX_UNREAD = 16
"""Events that are read ahead; a slow reader slows down the server's sending."""
MAX_REFUSAL = 2**16
EVENTS = "text/event-stream"


class Stream:
    """The events of a request, in the order in which they arrive. Whoever leaves it cancels the request.

    ``connect``: makes an HTTP client. ``url``: for messages. Iterating raises :class:`.failures.ServerError`.
    """

    def __init__(self, connect: Callable[[], httpx.AsyncClient], url: str, body: dict[str, Any]) -> None:
        self._connect, self._url, self._body = connect, url, body
        self._arrived: queue.Queue[Event | BaseException | None] = queue.Queue(MAX_UNREAD)
        self._closed = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        threading.Thread(target=self._run, name="pictures of a server", daemon=True).start()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Iterator[Event]:
        return (event for event in self.events(None) if event is not None)

    def events(self, every: float | None) -> Iterator[Event | None]:
        """The events, and ``None`` whenever none arrives for ``every`` seconds."""
        try:
            while True:
                try:
                    arrived = self._arrived.get(timeout=every)
                except queue.Empty:
                    yield None
                    continue
                if isinstance(arrived, BaseException):
                    raise arrived
                if arrived is None:
                    return
                yield arrived
        finally:
            self.close()

    def close(self) -> None:
        """End the request, from any thread: the server makes none of its pictures that are not finished."""
        self._closed.set()
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._receive())
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # raised where the events are read
            self._tell(error)
        else:
            self._tell(None)
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    def _tell(self, arrived: Event | BaseException | None) -> None:
        """Wait for the reader. It is the loop's only task, so that nothing else waits meanwhile."""
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._arrived.put(arrived, timeout=0.1)
                return

    async def _receive(self) -> None:
        import httpx

        self._task = asyncio.current_task()
        if self._closed.is_set():
            return
        try:
            async with self._connect() as http, http.stream(
                "POST", "v1/pictures", json=self._body, headers={"Accept": EVENTS}
            ) as answer:  # fmt: skip
                await self._read(answer)
        except httpx.HTTPError as error:
            raise failure(self._url, error) from None

    async def _read(self, answer: httpx.Response) -> None:
        if answer.status_code != 200:
            key = "authorization" in answer.request.headers
            raise refusal(self._url, answer.status_code, answer.headers, await _beginning(answer), key)
        if answer.headers.get("content-type", "").partition(";")[0].strip() != EVENTS:
            raise odd(self._url, "it is no stream of events")
        lines, count = Lines(), int(self._body.get("count", 1))
        try:
            async for chunk in answer.aiter_raw():
                for kind, data in lines.feed(chunk):
                    if kind == "done":
                        return
                    if (event := event_from(kind, data, count)) is not None:
                        self._tell(event)
        except ValueError as error:
            raise odd(self._url, error) from None
        raise gone(self._url)


async def _beginning(answer: httpx.Response) -> bytes:
    """At most :data:`MAX_REFUSAL` bytes of a body."""
    body = b""
    async for chunk in answer.aiter_raw():
        body += chunk
        if len(body) > MAX_REFUSAL:
            break
    return body[:MAX_REFUSAL]
