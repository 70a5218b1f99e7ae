"""A replica: an engine in a process of its own, which knows subjects by their paths only. Needs no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import UserError, explanation, out_of_memory
from ...generation.library import NamedAdapter
from ...pipelines.base import BaseSource
from ..engine import Engine, Statistics
from ..request import Request
from ..tickets import Closed, Event

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplicaSettings:
    """How a replica opens its base, and its limits. ``version``: another one replaces all replicas."""

    source: BaseSource
    at_once: int
    resident: int
    host_memory: int
    version: int = 0


@dataclass(frozen=True)
class Report:
    """What the replica ``name`` does, and the paths of the subjects that it has loaded."""

    name: str
    statistics: Statistics
    residents: tuple[str, ...]


class Replica:
    """Makes pictures for senders in other processes.

    Requests bring the files of all their subjects as ``adapters``. So a replica that starts later needs no list of
    them, and two subjects that get the same name one after the other are never taken for each other.
    """

    def __init__(self, settings: ReplicaSettings) -> None:
        self.name, self._changing = uuid.uuid4().hex, threading.Lock()
        self.engine = Engine(
            settings.source.open(), at_once=settings.at_once, resident=settings.resident,
            host_memory=settings.host_memory, waiting=2 * settings.at_once + 16,  # more than Ray ever sends
        )  # fmt: skip
        self.engine.__enter__()

    async def make(self, request: Request, lasting: Sequence[str]) -> AsyncGenerator[Event, None]:
        """The steps of a picture, and the picture or its error. Whoever stops to read cancels it.

        ``lasting``: those of its files that further requests may name.
        """
        with self._changing:
            for path in set(lasting) - self.engine.subjects.paths:
                self.engine.add_subject(NamedAdapter(path, path))
        try:
            ticket = self.engine.submit(request)
        except Closed:
            self.die()
            raise
        async with contextlib.aclosing(ticket.follow()) as events:
            async for event in events:
                if isinstance(event.error, Closed):
                    self.die()
                if event.kind != "queued":
                    yield portable(event)

    async def forget(self, paths: Sequence[str]) -> None:
        """Let subjects leave memory: these, and those that did not last."""
        with self._changing:
            for path in self.engine.subjects.paths.intersection(paths):
                self.engine.remove_subject(path)
        self.engine.forget_unnamed()

    async def ask(self, function: Callable[[Any], Any]) -> Any:
        """The result of ``function(pipe)`` between two passes."""
        return await asyncio.to_thread(self.engine.ask, function)

    async def report(self) -> Report:
        """What this replica does."""
        return Report(self.name, self.engine.statistics, tuple(self.engine.resident_paths))

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica whose engine has stopped after a bug."""
        if not self.engine.is_open:
            self.die()

    def die(self) -> None:
        """End the process at once: the senders of its pictures notice it, and send them to another replica."""
        log.error("the engine of this replica has stopped: it is replaced")
        os._exit(1)


def portable(event: Event) -> Event:
    """An event that can be sent to another process: latents on the CPU, and errors of known classes."""
    if event.latents is not None:
        return replace(event, latents=event.latents.cpu())
    if event.error is not None and not isinstance(event.error, UserError):
        log.error("a picture failed", exc_info=event.error)
        kind = MemoryError if out_of_memory(event.error) else RuntimeError
        return replace(event, error=kind(explanation(event.error) or f"{type(event.error).__name__}: {event.error}"))
    return event
