"""Limits on HTTP connections."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .bodies import MIN_RATE

HEAD_SECONDS = 20.0
"""Time for the head of a request; a connection that sends none, or sends it more slowly, is closed."""


class Connection(H11Protocol):
    """A connection that cannot stay open without a request, nor with a client that does not read its answer.

    uvicorn waits forever for the head of the first request, for the rest of a body that was answered before it came,
    and for a client to read. ``head_seconds``: other than :data:`HEAD_SECONDS`.
    """

    head_seconds: float | None = None
    _awaited: object = None
    _reading: asyncio.TimerHandle | None = None

    @property
    def _patience(self) -> float:
        return self.head_seconds or HEAD_SECONDS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(self._patience, self._check)
        self._awaited = self.cycle

    def _check(self) -> None:
        answered = self.cycle is not None and self.cycle.response_complete  # maybe before all of its body came
        waiting = answered or self.conn.their_state is h11.IDLE
        if self.transport.is_closing() or (
            waiting and self._awaited is self.cycle
        ):  # none has begun since the last check
            self.transport.close()
            self._abort_unless_read()
            return
        self._awaited = self.cycle if waiting else self
        self.loop.call_later(self._patience, self._check)

    def pause_writing(self) -> None:
        """The client has not read what was sent, and nothing more is sent until it does."""
        super().pause_writing()
        self._reading = self._abort_unless_read()

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()

    def _abort_unless_read(self) -> asyncio.TimerHandle:
        unread = self.transport.get_write_buffer_size()
        return self.loop.call_later(self._patience + unread / MIN_RATE, self.transport.abort)


def patient(seconds: float) -> type[Connection]:
    """Connections with another time for the head of a request."""
    return type("Connection", (Connection,), {"head_seconds": seconds})


HTTP: dict[str, Any] = {
    "http": Connection, "ws": "none", "proxy_headers": False, "server_header": False, "limit_concurrency": 512,
}  # fmt: skip
"""Settings of uvicorn: a parser with limits, no websockets, no client addresses from headers, a limit on clients."""
