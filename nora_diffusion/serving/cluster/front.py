"""The engine's place in the server if its pictures are made by replicas: queues them, sends them, sends them again.

A picture follows from its seed and settings alone. So one whose replica was killed is made again by another.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import operator
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from ...errors import UserError
from ...generation.library import NamedAdapter
from ..engine import Engine, Statistics
from ..pictures import Work, enqueue, tell_places, works_of
from ..request import Request
from ..subjects import Subjects
from ..tickets import Closed, Event, Ticket
from ..waiting import FairQueue
from .replica import Report

log = logging.getLogger(__name__)
T = TypeVar("T")

TRIES = 5
"""A picture whose replica dies so often is given up: it may be the reason."""
PAUSE = 0.2
"""Seconds before it is sent again, doubled each time, in which Ray notices the death."""
GAUGES = ("resident", "held", "held_bytes")
HISTOGRAMS = ("pass_rows", "pass_seconds")
COUNTERS = ("passes", "rows", "hits", "loads", "reads")


class Lost(Exception):
    """The replica has died."""


class Replicas(Protocol):
    """See :class:`.deployment.Deployment`. Each method may be called in any thread."""

    def make(self, request: Request, lasting: Sequence[str]) -> AsyncGenerator[Event, None]:
        """The events of a picture, from the replica that its first subject prefers. Raises :class:`Lost`."""

    def ask(self, function: Callable[[Any], T]) -> T:
        """The answer of one replica. Raises :class:`Lost`."""

    async def forget(self, paths: Sequence[str]) -> None:
        """Let these subjects, and those of requests that have ended, leave memory everywhere."""

    def reports(self) -> list[Report]:
        """What the replicas do."""

    def renew(self) -> None:
        """Replace all replicas, one after the other; those replaced finish their pictures."""

    def close(self) -> None:
        """End all replicas."""


class Front:
    """Has the interface of :class:`..engine.Engine`; ``with Front(replicas, subjects) as front``.

    ``at_work``: pictures that the replicas have at most, together. ``waiting``: pictures that wait at most.
    """

    def __init__(
        self,
        replicas: Replicas,
        subjects: Sequence[NamedAdapter] = (),
        *,
        at_work: int = 16,
        waiting: int = 256,
    ) -> None:
        self.subjects, self._replicas, self._most = Subjects(subjects), replicas, at_work
        self._queue: FairQueue[Work] = FairQueue(waiting)
        self._at_work: dict[Work, asyncio.Task[Event]] = {}
        self._forgetting: set[asyncio.Task[None]] = set()
        self._reports: dict[str, Report] = {}
        self._changed, self._closing = threading.Condition(), False
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run, name="front", daemon=True)

    def __enter__(self) -> Front:
        self._loop = asyncio.new_event_loop()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, request: Request) -> Ticket:
        """Queue a request. Raises :class:`UserError` if it is not possible, :class:`..waiting.Full` without room."""
        works = works_of(request, self.subjects)
        ticket = works[0].ticket
        ticket.on_cancel = lambda: self._call(self._end, ticket)
        with self._changed:
            if self._closing:
                raise Closed("the server is being stopped: send the request again later")
            enqueue(self._queue, works)
        self._call(self._admit)
        if request.timeout is not None:
            self._call(self._loop.call_later, request.timeout + 0.01, self._end, ticket)
        return ticket

    @property
    def resident_paths(self) -> set[str]:
        """The paths of subjects that a replica has loaded."""
        return {path for report in self._replicas.reports() for path in report.residents}

    @property
    def statistics(self) -> Statistics:
        """What the replicas do, and have done together, also those that are gone."""
        now = self._replicas.reports()
        self._reports.update({report.name: report for report in now})
        sums = Counter(dict.fromkeys(GAUGES + COUNTERS, 0))
        for report in now:
            sums.update({name: getattr(report.statistics, name) for name in GAUGES})
        for report in self._reports.values():
            sums.update({name: getattr(report.statistics, name) for name in COUNTERS})
        found: dict[str, Any] = dict(sums)
        for name in HISTOGRAMS:
            own = (getattr(report.statistics, name) for report in self._reports.values())
            found[name] = functools.reduce(operator.add, own, getattr(Statistics, name))
        return Statistics(waiting=len(self._queue), at_work=len(self._at_work), **found)

    @property
    def is_open(self) -> bool:
        """Whether requests are accepted and worked on."""
        return not self._closing and self._thread.is_alive()

    def add_subject(self, subject: NamedAdapter) -> None:
        """Let requests name another adapter. Raises :class:`UserError` if the name is taken."""
        self.subjects.add(subject)

    def remove_subject(self, name: str) -> None:
        """Forget an adapter, also in the replicas. Waiting pictures that name it fail.

        Raises :class:`UserError` if there is none.
        """
        self._forget([own.path for own in self.subjects.remove(name)])

    def forget_unnamed(self) -> None:
        """Let adapters that came with a request leave the replicas."""
        self._forget([])

    def _forget(self, paths: list[str]) -> None:
        """Does not wait for the replicas."""

        def start() -> None:
            task = self._loop.create_task(self._replicas.forget(paths))
            self._forgetting.add(task)
            task.add_done_callback(self._forgetting.discard)

        self._call(start)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """The weights of clients from now on, 1 for others."""
        self._queue.set_weights(weights)

    def ask(self, function: Callable[[Any], T]) -> T:
        """The result of ``function(pipe)`` in one of the replicas. Raises what it raises."""
        if not self.is_open:
            raise Closed("the server is being stopped: ask again later")
        for _ in range(TRIES):
            try:
                return self._replicas.ask(function)
            except Lost:
                log.warning("the replica of a question died: it goes to another")
        raise RuntimeError(f"{TRIES} replicas died of a question")

    def renew(self) -> None:
        """Replace all replicas one after the other, so that the base and packs are read again. No request is lost.

        Raises :class:`UserError` if the new ones do not start; old ones that are left go on.
        """
        self._replicas.renew()

    def close(self, drain: bool = True) -> None:
        """Stop. ``drain``: first finish what was accepted; else it fails with :class:`..tickets.Closed`."""
        with self._changed:
            self._closing = True
        if not self._thread.is_alive():
            return
        if not drain:
            self._call(self._drop, lambda work: True, Closed("the server was stopped"))
        with self._changed:
            self._changed.wait_for(lambda: not self._at_work and not len(self._queue))
        self._call(self._loop.stop)
        self._thread.join()
        self._replicas.close()

    def _call(self, function: Callable[..., object], *given: Any) -> None:
        """Call it in the thread of the loop, where all that follows happens."""
        with contextlib.suppress(RuntimeError):  # it has stopped
            self._loop.call_soon_threadsafe(function, *given)

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def _admit(self) -> None:
        """Send pictures while the replicas have room for them."""
        with self._changed:
            while len(self._at_work) < self._most and (work := self._queue.take()):
                self._at_work[work] = task = self._loop.create_task(self._make(work))
                task.add_done_callback(functools.partial(self._made, work))
            tell_places(self._queue, list(self._queue))
            self._changed.notify_all()

    def _made(self, work: Work, task: asyncio.Task[Event]) -> None:
        """Tell the sender how a picture ended, and send the next one."""
        if task.cancelled():
            work.fail(work.ticket.ended or Closed("the server was stopped"))
        elif error := task.exception():
            work.fail(error)
        else:
            work.ticket.tell(task.result())
        with self._changed:
            del self._at_work[work]
        self._admit()

    def _end(self, ticket: Ticket) -> None:
        """End the pictures of a request that is no longer wanted."""
        if ended := ticket.ended:
            self._drop(lambda work: work.ticket is ticket, ended)

    def _drop(self, chosen: Callable[[Work], bool], error: UserError) -> None:
        for work in self._queue:
            if chosen(work) and self._queue.remove(work):
                work.fail(error)
        for work, task in self._at_work.items():
            if chosen(work):
                task.cancel()
        self._admit()

    async def _make(self, work: Work) -> Event:
        """The last event of a picture, whatever happens to its replica."""
        work.ticket.began[work.index] = time.monotonic()
        self.subjects.check_there(work.ticket.request, work.sources)
        request = single(work)
        for number in range(TRIES):
            try:
                return await self._follow(work, request)
            except Lost:
                log.warning("the replica of a picture died: the picture is made again")
                await asyncio.sleep(PAUSE * 2**number)
        raise RuntimeError(f"{TRIES} replicas died one after the other while they made the picture")

    async def _follow(self, work: Work, request: Request) -> Event:
        """Tell the sender the steps that a replica tells; its last event."""
        last, attached = None, set(work.ticket.request.adapters.values())
        lasting = [path for path in request.adapters.values() if path not in attached]
        async with contextlib.aclosing(self._replicas.make(request, lasting)) as events:
            async for event in events:
                picture = event.picture and replace(event.picture, index=work.index)
                last = replace(event, index=work.index, picture=picture)
                if not last.is_last:
                    work.ticket.tell(last)
        if last is None or not last.is_last:
            raise Lost
        return last


def single(work: Work) -> Request:
    """The request of one picture alone, with the files of its subjects. The front keeps the time."""
    request = work.ticket.request
    files = {tag.name: source.path for tag, source in zip(request.tags, work.sources, strict=True)}
    return replace(request, seed=request.seed + work.index, count=1, timeout=None, adapters=files)


AnyEngine = Engine | Front
