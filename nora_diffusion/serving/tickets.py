"""What the sender of a request holds: its events, its pictures, and the way to cancel it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import UserError
from ..generation.image_settings import ImageSettings
from .request import Request

log = logging.getLogger(__name__)
EventKind = Literal["queued", "step", "picture", "error"]


class Cancelled(UserError):
    """The request was cancelled by its sender."""


class Late(UserError):
    """The request was not finished in its time."""


class Closed(UserError):
    """The engine was stopped."""


@dataclass(frozen=True)
class Picture:
    """A finished picture with its settings."""

    index: int
    image: Any
    settings: ImageSettings


@dataclass(frozen=True)
class Event:
    """What happened to picture ``index`` of a request.

    ``queued``: it waits; ``place`` 1 is the next one; told again when it changes. ``step``: ``step`` of ``steps`` is
    done; ``latents`` are its prediction. ``picture``: it is finished. ``error``: it failed.
    """

    kind: EventKind
    index: int
    step: int = 0
    steps: int = 0
    latents: Any = None
    picture: Picture | None = None
    error: BaseException | None = None
    place: int = 0

    @property
    def is_last(self) -> bool:
        """Whether no other event of this picture follows."""
        return self.kind in ("picture", "error")


@dataclass(eq=False)
class Ticket:
    """A request at work.

    ``made``: how many of its pictures are finished. ``began``: when each of them was started, as far as that is known.
    ``on_cancel``: called when it is cancelled, in any thread.
    """

    request: Request
    sent: float = field(default_factory=time.monotonic)
    made: int = 0
    began: dict[int, float] = field(default_factory=dict)
    _events: list[Event] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _cancelled: bool = False
    _listener: Callable[[], object] | None = None
    _watcher: Callable[[Event], object] | None = None
    on_cancel: Callable[[], object] | None = None

    def cancel(self) -> None:
        """End the request; its pictures fail with :class:`Cancelled` before their next step."""
        self._cancelled = True
        if self.on_cancel is not None:
            self.on_cancel()

    @property
    def ended(self) -> UserError | None:
        """Why the request is no longer wanted, if so."""
        timeout = self.request.timeout
        if self._cancelled:
            return Cancelled("the request was cancelled")
        if timeout is not None and time.monotonic() > self.sent + timeout:
            return Late(f"the request was not finished in its {timeout:g} seconds: allow more, or send fewer at once")
        return None

    def tell(self, event: Event) -> None:
        """Called by the engine."""
        with self._changed:
            if self._watcher is not None:
                _call(self._watcher, event)
            if not event.is_last:  # a slow reader gets the latest place and step only, and no latents pile up
                alike = (event.kind, event.index)
                self._events = [own for own in self._events if (own.kind, own.index) != alike]
            self._events.append(event)
            self.made += event.kind == "picture"
            self._changed.notify_all()
            listener = self._listener
        if listener is not None:
            _call(listener)

    def watch(self, watcher: Callable[[Event], object]) -> None:
        """Call ``watcher`` with each event before it can be read, also with those that nobody has read yet."""
        with self._changed:
            self._watcher = watcher
            for event in self._events:
                watcher(event)

    def listen(self, listener: Callable[[], object]) -> None:
        """Call ``listener`` from now on when there are new events, in the thread that tells them, and once now."""
        with self._changed:
            self._listener = listener
        listener()

    def take(self) -> list[Event]:
        """The events that have not been read; does not wait."""
        with self._changed:
            events, self._events = self._events, []
            return events

    def events(self) -> Iterator[Event]:
        """All events until every picture is finished or has failed."""
        left = self.request.count
        while left:
            event = self._next(None)
            assert event is not None
            left -= event.is_last
            yield event

    async def follow(self) -> AsyncGenerator[Event, None]:
        """The same for a coroutine, without a thread. Whoever stops to read cancels the request."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(changed.set)

        self.listen(notify)
        left = self.request.count
        try:
            while left:
                await changed.wait()
                changed.clear()
                for event in self.take():
                    left -= event.is_last
                    yield event
        finally:
            if left:
                self.cancel()

    def _next(self, timeout: float | None) -> Event | None:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._events), timeout)
            return self._events.pop(0) if self._events else None

    def pictures(self) -> list[Picture]:
        """Wait for all pictures. Raises the first error."""
        return pictures_of([event for event in self.events() if event.is_last])


def pictures_of(events: Sequence[Event]) -> list[Picture]:
    """The pictures of the events of a request, in their order. Raises the first error."""
    error = next((event.error for event in events if event.error is not None), None)
    if error is not None:
        raise error
    return sorted((event.picture for event in events if event.picture is not None), key=lambda own: own.index)


def _call(function: Callable[..., object], *given: Event) -> None:
    """Call what a sender gave; its errors are its own, and stop neither the engine nor the event."""
    try:
        function(*given)
    except Exception:
        log.exception("a watcher of a request failed")
