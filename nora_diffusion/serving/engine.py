"""The engine: admits pictures, loads their subjects, and has the calls of all pictures at work computed together.

Between two passes pictures start, end, are cancelled, and subjects are loaded. So pictures at different steps, with
different samplers, subjects and weights, share the passes of the base; each equals a run of its own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ..errors import UserError
from ..generation.image_settings import adapter_settings
from ..generation.library import NamedAdapter
from ..loaders.locking import exclusive
from ..pipelines.components import components
from .histogram import NO_ROWS, NO_SECONDS, Histogram
from .passes import Passes
from .pictures import Copies, Work, enqueue, start, tell_places, works_of
from .rendezvous import Call, Rendezvous
from .request import Request
from .residents import Residents
from .rows import Spec
from .subjects import Source, Subjects
from .tickets import Closed, Ticket
from .waiting import FairQueue

HOST_MEMORY = 2**30
log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Statistics:
    """What an engine does and has done.

    ``waiting``, ``at_work``: pictures. ``passes``, ``rows``: of the denoiser so far. ``resident``: subjects in the
    pipeline; ``hits``: how often one was wanted that was there, ``loads``: that was not. ``held``, ``held_bytes``:
    subjects in host memory and their size, ``reads``: how often one was read from its file. ``pass_rows``,
    ``pass_seconds``: of the passes of the denoiser.
    """

    waiting: int
    at_work: int
    passes: int
    rows: int
    resident: int
    hits: int
    loads: int
    held: int
    held_bytes: int
    reads: int
    pass_rows: Histogram = NO_ROWS
    pass_seconds: Histogram = NO_SECONDS


class Engine:
    """Makes the pictures of many requests on one pipeline; ``with Engine(pipe, subjects) as engine``.

    ``pipe``: the engine's own from now on; opened by :meth:`.pipelines.base.BaseSource.open`, so that a CPU is as fast
    in the engine's thread as elsewhere. ``subjects``: adapters that requests may name
    (:func:`~nora_diffusion.generation.library.list_library`). ``at_once``: pictures at work at most. ``resident``:
    subjects in the pipeline at most. ``host_memory``: bytes that more of them may take in memory. ``waiting``:
    pictures that wait at most. ``weights``: of clients, 1 for others.
    """

    def __init__(
        self,
        pipe: Any,
        subjects: Sequence[NamedAdapter] = (),
        *,
        at_once: int = 16,
        resident: int = 64,
        host_memory: int = HOST_MEMORY,
        waiting: int = 256,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        if at_once < 1 or resident < 1 or waiting < 1 or host_memory < 0:
            raise UserError("at_once, resident and waiting must be 1 or more, host_memory 0 or more")
        self.pipe, self.subjects, self.at_once = pipe, Subjects(subjects), at_once
        self._queue: FairQueue[Work] = FairQueue(waiting, weights)
        self._passes = Passes(pipe, self._specs)
        self._residents = Residents(pipe, resident, host_memory, self._passes.close)
        self._meeting = Rendezvous()
        self._copies = Copies(pipe, self._meeting)
        self._at_work: list[Work] = []
        self._stale = False
        self._asked: list[tuple[Callable[[Any], Any], Future[Any]]] = []
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._closing: bool | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> Engine:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, request: Request) -> Ticket:
        """Queue a request. Raises :class:`UserError` if it is not possible, :class:`.waiting.Full` without room."""
        works = works_of(request, self.subjects)
        with self._wake:
            if self._closing is not None:
                raise Closed("the engine is being stopped: send the request again later")
            enqueue(self._queue, works)
            self._wake.notify_all()
        return works[0].ticket

    @property
    def resident_paths(self) -> set[str]:
        """The paths of the subjects in the pipeline."""
        return {source.path for source in list(self._residents.loaded)}

    @property
    def statistics(self) -> Statistics:
        """What the engine does and has done."""
        with self._lock:
            at_work = len(self._at_work)
        here, host = self._residents, self._residents.host
        return Statistics(
            len(self._queue), at_work, self._passes.count, self._passes.rows, len(here.loaded), here.hits, here.loads,
            len(host), host.bytes, host.reads, self._passes.fills, self._passes.durations,
        )  # fmt: skip

    @property
    def is_open(self) -> bool:
        """Whether requests are accepted and worked on."""
        return self._closing is None and self._thread.is_alive()

    def add_subject(self, subject: NamedAdapter) -> None:
        """Let requests name another adapter. Raises :class:`UserError` if the name is taken."""
        self.subjects.add(subject)

    def remove_subject(self, name: str) -> None:
        """Forget an adapter. It leaves memory before the next pass, or after the pictures at work that use it.

        Waiting pictures that name it fail. Raises :class:`UserError` if there is none.
        """
        self.subjects.remove(name)
        self.forget_unnamed()

    def forget_unnamed(self) -> None:
        """Let adapters that came with a request leave memory, after the pictures at work that use them."""
        with self._wake:
            self._stale = True
            self._wake.notify_all()

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """The weights of clients from now on, also of their waiting pictures; 1 for others."""
        self._queue.set_weights(weights)

    def ask(self, function: Callable[[Any], T]) -> T:
        """The result of ``function(pipe)``, called between two passes, when nothing changes the pipeline.

        Raises what it raises, and :class:`.tickets.Closed` if the engine is not running.
        """
        answer: Future[T] = Future()
        with self._wake:
            if not self.is_open:
                raise Closed("the engine is being stopped: ask again later")
            self._asked.append((function, answer))
            self._wake.notify_all()
        return answer.result()

    def close(self, drain: bool = True) -> None:
        """Stop the engine. ``drain``: first finish what was accepted; else it fails with :class:`.tickets.Closed`."""
        with self._wake:
            self._closing = drain and self._closing is not False  # a stop, after a bug say, stays one
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        with torch.no_grad(), exclusive(self.pipe):
            try:
                _channels_last(self.pipe)
                while self._turn():
                    pass
            finally:
                self._fail_left()
                self._passes.close()
                self._answer_asked()

    def _fail_left(self) -> None:
        """End what is still open, so that nobody waits."""
        closed = Closed("the engine was stopped")
        with self._lock:
            self._closing = False
        while left := self._queue.take():
            left.fail(closed)
        self._meeting.close(closed)

    def _turn(self) -> bool:
        """Admit pictures and compute a pass; whether to go on. After a bug the engine stops, so that nobody waits."""
        try:
            if not self._admit():
                return False
            if calls := self._wanted(self._meeting.wait()):
                group = self._passes.next(calls)
                self._meeting.take(group)
                self._passes.compute(group)
        except Exception:
            if self._closing is False:
                raise
            log.exception("the engine stops after an error")
            with self._lock:
                self._closing = False
        return True

    def _admit(self) -> bool:
        """Start pictures while there is room; wait for one if none is at work. Whether to go on."""
        with self._wake:
            self._wake.wait_for(lambda: self._has_work or self._closing is not None)
            if self._closing is not None and not self._at_work and (not self._closing or not len(self._queue)):
                return False
        self._answer_asked()
        self._forget_removed()
        moved = self._drop_ended()
        if not self._at_work:
            self._passes.rest()
        while (work := self._next()) is not None and self._queue.start(work):
            self._start(work)
            moved = True
        if moved:
            with self._lock:
                tell_places(self._queue, list(self._queue))
        return True

    def _next(self) -> Work | None:
        """The picture that starts now. One whose subjects find no room waits, and the others behind it."""
        if len(self._at_work) >= self.at_once or self._closing is False or (work := self._queue.first()) is None:
            return None
        return work if not self._at_work or self._residents.fit(work.sources, self._in_use()) else None

    @property
    def _has_work(self) -> bool:
        return bool(self._at_work or len(self._queue) or self._stale or self._asked)

    def _answer_asked(self) -> None:
        with self._lock:
            asked, self._asked = self._asked, []
        for function, answer in asked:
            try:
                answer.set_result(function(self.pipe))
            except BaseException as error:
                answer.set_exception(error)

    def _forget_removed(self) -> None:
        """Remove from memory the subjects that may no longer be named, unless a picture at work uses them."""
        with self._lock:
            if not self._stale:
                return
            self._stale = False
        paths, in_use = self.subjects.paths, self._in_use()
        removed = {source for source in self._residents.known() if source.path not in paths}
        self._residents.forget(removed - in_use)
        if removed - in_use:
            self._passes.forget()
        if removed & in_use:
            with self._lock:
                self._stale = True

    def _drop_ended(self) -> bool:
        """Take waiting pictures that are no longer wanted out of the queue, where they would keep others out.

        Whether there were any.
        """
        dropped = False
        for work in self._queue:
            if (ended := work.ticket.ended) and self._queue.remove(work):
                work.fail(ended)
                dropped = True
        return dropped

    def _start(self, work: Work) -> None:
        if ended := work.ticket.ended:
            work.fail(ended)
            return
        try:
            self.subjects.check_there(work.ticket.request, work.sources)
            self._load(work)
            own = self._copies.of(work)
        except Exception as error:
            work.fail(error)
            return
        with self._lock:
            self._at_work.append(work)
        try:
            start(work, own, self._meeting, self._ended)
        except RuntimeError as error:  # no more threads can be started
            self._ended(work)
            self._meeting.leave(work)
            work.fail(error)

    def _ended(self, work: Work) -> None:
        with self._lock:
            self._at_work.remove(work)

    def _specs(self) -> list[Spec]:
        with self._lock:
            return [work.spec for work in self._at_work]

    def _in_use(self) -> set[Source]:
        with self._lock:
            return {source for work in self._at_work for source in work.sources}

    def _load(self, work: Work) -> None:
        """Load the subjects of a picture, and note its rows' adapters."""
        in_use, adapters = self._in_use() | set(work.sources), []
        for source, tag in zip(work.sources, work.ticket.request.tags, strict=True):
            slot = self._residents.get(source, in_use)
            adapters.append((slot.adapter, tag.unet, tag.te))
            work.described.append(adapter_settings(slot.info, "", tag.name, tag.unet, tag.te))
        work.spec = Spec(tuple(adapters))

    def _wanted(self, calls: Sequence[Call]) -> list[Call]:
        """The calls of pictures that are still wanted; the others end here."""
        wanted = []
        for call in calls:
            assert isinstance(call.picture, Work)
            ended = Closed("the engine was stopped") if self._closing is False else call.picture.ticket.ended
            if ended is None:
                wanted.append(call)
            else:
                self._meeting.take([call])
                call.fail(ended)
        return wanted


def _channels_last(pipe: Any) -> None:
    """Store the weights of convolutions as their kernels read them: large batches take a fifth less time on a CPU."""
    for model in (*components(pipe).values(), pipe.vae):
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
