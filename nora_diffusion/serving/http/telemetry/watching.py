"""Watches the events of a request, for metrics and traces."""

from __future__ import annotations

import time
from typing import Any

from ....errors import UserError
from ...tickets import Cancelled, Closed, Event, Late, Ticket
from .metrics import Metrics
from .tracing import Tracing


def _reason(error: BaseException | None) -> str:
    """Why a picture failed, in one word."""
    kinds = {Cancelled: "cancelled", Late: "late", Closed: "stopped", UserError: "refused"}
    return next((word for kind, word in kinds.items() if isinstance(error, kind)), "fault")


class Watcher:
    """Called with each event of a ticket, in the thread that tells it. ``span``: of the request."""

    def __init__(self, ticket: Ticket, metrics: Metrics, tracing: Tracing, span: Any) -> None:
        self._ticket, self._metrics, self._tracing, self._span = ticket, metrics, tracing, span
        self._subjects = [tag.name for tag in ticket.request.tags if tag.name not in ticket.request.adapters]
        self._began: dict[int, float] = {}
        self._last: dict[int, float] = {}

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        if event.kind == "queued":
            return
        if event.index not in self._began and event.kind != "error":
            self._start(event.index, self._ticket.began.get(event.index, now))
        if event.kind == "step":
            if event.index in self._last:
                self._metrics.stepped(now - self._last[event.index])
            self._last[event.index] = now
        elif event.kind == "picture":
            self._metrics.finished(now - self._ticket.sent, self._subjects)
        else:
            self._metrics.failed(_reason(event.error))
        if event.is_last:
            began = self._began.get(event.index, self._ticket.began.get(event.index))
            if began is None:  # it failed in the queue
                self._tracing.part(self._span, "queue", event.index, self._ticket.sent, now)
            else:
                self._tracing.part(self._span, "making", event.index, began, now)

    def _start(self, index: int, began: float) -> None:
        self._began[index] = began
        self._metrics.waited(began - self._ticket.sent)
        self._tracing.part(self._span, "queue", index, self._ticket.sent, began)
