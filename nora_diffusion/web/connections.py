"""Limits on HTTP connections."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0
"""Time for the head of a request; a connection that sends none, or sends it more slowly, is closed."""


class Connection(H11Protocol):
    """A connection that cannot stay open without a request.

    uvicorn waits forever for the head of the first one, and for the rest of a body that was answered before it came.
    ``head_seconds``: other than :data:`HEAD_SECONDS`.
    """

    head_seconds: float | None = None
    _awaited: object = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(self.head_seconds or HEAD_SECONDS, self._check)
        self._awaited = self.cycle

    def _check(self) -> None:
        if self.transport.is_closing():
            return
        answered = self.cycle is not None and self.cycle.response_complete  # maybe before all of its body came
        waiting = answered or self.conn.their_state is h11.IDLE
        if waiting and self._awaited is self.cycle:  # no request has begun since the last check
            self.transport.close()
            return
        self._awaited = self.cycle if waiting else self
        self.loop.call_later(self.head_seconds or HEAD_SECONDS, self._check)


def patient(seconds: float) -> type[Connection]:
    """Connections with another time for the head of a request."""
    return type("Connection", (Connection,), {"head_seconds": seconds})


HTTP: dict[str, Any] = {
    "http": Connection, "ws": "none", "proxy_headers": False, "server_header": False, "limit_concurrency": 512,
}  # fmt: skip
"""Settings of uvicorn: a parser with limits, no websockets, no client addresses from headers, a limit on clients."""
