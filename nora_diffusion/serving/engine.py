"""The engine: admits pictures, and computes the calls of all pictures at work in common passes.

Between two passes pictures start, end, are cancelled, and subjects are loaded. So pictures at different steps, with
different samplers, subjects and weights, share the passes of the base; each equals a run of its own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import UserError, out_of_memory
from ..generation.image_settings import adapter_settings
from ..generation.library import NamedAdapter, find_adapter
from ..loaders.locking import exclusive
from ..pipelines.names import DENOISERS
from .merging import merged, parted
from .pictures import Work, own_pipeline, start
from .rendezvous import Call, Rendezvous
from .request import Request
from .residents import Resident, Residents
from .rows import Rows, Spec
from .samplers import check_sampler
from .tickets import Closed, Event, Ticket
from .waiting import FairQueue

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Statistics:
    """Pictures that wait and that are at work; passes of the denoiser so far and their rows; subjects and loads."""

    waiting: int
    at_work: int
    passes: int
    rows: int
    resident: int
    loads: int


class Engine:
    """Makes the pictures of many requests on one pipeline; ``with Engine(pipe, subjects) as engine``.

    ``pipe``: the engine's own from now on. ``subjects``: adapters that requests may name
    (:func:`~nora_diffusion.generation.library.list_library`). ``at_once``: pictures at work at most. ``resident``:
    subjects that are loaded at most. ``waiting``: pictures that wait at most. ``weights``: of clients, 1 for others.
    """

    def __init__(
        self,
        pipe: Any,
        subjects: Sequence[NamedAdapter] = (),
        *,
        at_once: int = 16,
        resident: int = 64,
        waiting: int = 256,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        if at_once < 1 or resident < 1 or waiting < 1:
            raise UserError("at_once, resident and waiting must be 1 or more")
        self.pipe, self.subjects, self.at_once = pipe, list(subjects), at_once
        self._queue: FairQueue[Work] = FairQueue(waiting, weights)
        self._residents, self._rows = Residents(pipe, resident), Rows(pipe)
        self._meeting, self._tokenizing = Rendezvous(), threading.RLock()
        self._at_work: list[Work] = []
        self._removed: set[str] = set()
        self._asked: list[tuple[Callable[[Any], Any], Future[Any]]] = []
        self._passes = self._pass_rows = 0
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
        check_sampler(request.sampler)
        own = request.adapters
        paths = tuple(own.get(tag.name) or find_adapter(tag, self.subjects).path for tag in request.tags)
        if len(set(paths)) < len(paths):
            raise UserError("two subjects of the request are the same adapter: give it once")
        ticket = Ticket(request)
        works = [Work(ticket, index, paths) for index in range(request.count)]
        with self._wake:
            if self._closing is not None:
                raise Closed("the engine is being stopped: send the request again later")
            self._queue.put(works, request.client, works[0].cost, request.priority)
            for work, place in zip(works, self._queue.places(works), strict=True):
                ticket.tell(Event("queued", work.index, place=place))
            self._wake.notify_all()
        return ticket

    @property
    def residents(self) -> Mapping[str, Resident]:
        """The loaded subjects by path."""
        return self._residents.loaded

    @property
    def statistics(self) -> Statistics:
        """What the engine does and has done."""
        with self._lock:
            at_work = len(self._at_work)
        loads, loaded = self._residents.loads, len(self._residents.loaded)
        return Statistics(len(self._queue), at_work, self._passes, self._pass_rows, loaded, loads)

    @property
    def is_open(self) -> bool:
        """Whether requests are accepted and worked on."""
        return self._closing is None and self._thread.is_alive()

    def add_subject(self, subject: NamedAdapter) -> None:
        """Let requests name another adapter. Raises :class:`UserError` if the name is taken."""
        with self._wake:
            if any(own.name == subject.name for own in self.subjects):
                raise UserError(f"there is a subject {subject.name!r} already: choose another name")
            self.subjects = [*self.subjects, subject]  # a new list: readers take no lock
            self._removed.discard(subject.path)

    def remove_subject(self, name: str) -> None:
        """Forget an adapter. It is unloaded before the next pass, or after the pictures at work that use it.

        Waiting pictures that name it fail. Raises :class:`UserError` if there is none.
        """
        with self._wake:
            found = [own for own in self.subjects if own.name == name]
            if not found:
                raise UserError(f"there is no subject {name[:80]!r}")
            self.subjects = [own for own in self.subjects if own.name != name]
            self._removed.update(own.path for own in found)
            self._wake.notify_all()

    def forget(self, paths: Iterable[str]) -> None:
        """Unload adapters of a request that has ended (:attr:`.request.Request.adapters`), as of a removed subject."""
        with self._wake:
            self._removed.update(paths)
            self._wake.notify_all()

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
            self._closing = drain
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        with torch.no_grad(), exclusive(self.pipe):
            try:
                while self._turn():
                    pass
            finally:
                self._rows.close()
                self._answer_asked()

    def _turn(self) -> bool:
        """Admit pictures and compute a pass; whether to go on. After a bug the engine stops, so that nobody waits."""
        try:
            if not self._admit():
                return False
            if calls := self._wanted(self._meeting.wait()):
                group = _group(calls)
                self._meeting.take(group)
                self._compute(group)
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
                for left in self._queue:
                    left.fail(Closed("the engine was stopped"))
                return False
        self._answer_asked()
        self._unload_removed()
        self._drop_ended()
        while len(self._at_work) < self.at_once and self._closing is not False and (waiting := self._queue.take()):
            self._start(waiting)
        return True

    @property
    def _has_work(self) -> bool:
        return bool(self._at_work or len(self._queue) or self._removed or self._asked)

    def _answer_asked(self) -> None:
        with self._lock:
            asked, self._asked = self._asked, []
        for function, answer in asked:
            try:
                answer.set_result(function(self.pipe))
            except BaseException as error:
                answer.set_exception(error)

    def _unload_removed(self) -> None:
        with self._lock:
            free = self._removed - {path for work in self._at_work for path in work.paths}
            self._removed -= free
        if loaded := [path for path in free if path in self._residents.loaded]:
            self._rows.close()
            for path in loaded:
                self._residents.remove(path)

    def _drop_ended(self) -> None:
        """Take waiting pictures that are no longer wanted out of the queue, where they would keep others out."""
        for work in self._queue:
            if (ended := work.ticket.ended) and self._queue.remove(work):
                work.fail(ended)

    def _start(self, work: Work) -> None:
        if ended := work.ticket.ended:
            work.fail(ended)
            return
        own = work.ticket.request.adapters.values()
        if set(work.paths) - {subject.path for subject in self.subjects} - set(own):
            work.fail(UserError("a subject of the request was removed while it waited: send it without that subject"))
            return
        try:
            self._load(work)
            own = own_pipeline(self.pipe, work, self._meeting, self._tokenizing)
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

    def _load(self, work: Work) -> None:
        """Load the subjects of a picture, and note its rows' adapters."""
        if missing := self._residents.missing(work.paths):
            with self._lock:
                in_use = {path for other in self._at_work for path in other.paths} | set(work.paths)
            self._rows.close()
            for path in missing:
                self._residents.load(path, in_use)
        adapters = []
        for path, tag in zip(work.paths, work.ticket.request.tags, strict=True):
            resident = self._residents.get(path)
            adapters.append((resident.adapter, tag.unet, tag.te))
            work.described.append(adapter_settings(resident.info, "", tag.name, tag.unet, tag.te))
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

    def _compute(self, calls: Sequence[Call]) -> None:
        """Answer calls of one model by one pass. If it fails, it is halved, so that a picture fails alone."""
        try:
            self._answer(calls)
        except Exception as error:
            if out_of_memory(error) and torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(calls) == 1:
                calls[0].fail(error)
                return
            log.warning("a pass of %d pictures failed and is halved: %s", len(calls), error)
            middle = len(calls) // 2
            for half in (calls[:middle], calls[middle:]):
                self._compute(half)

    def _answer(self, calls: Sequence[Call]) -> None:
        name, _, method = calls[0].model.partition(".")
        model = getattr(self.pipe, name)
        pass_ = merged([call.arguments for call in calls])
        if method:
            result = getattr(model, method)(*pass_.args, **pass_.kwargs)
        else:
            self._assign(name, calls)
            if name in DENOISERS:
                self._passes, self._pass_rows = self._passes + 1, self._pass_rows + pass_.rows
            result = model(*pass_.args, **pass_.kwargs)
        for call, own in zip(calls, parted(result, [call.arguments.rows for call in calls]), strict=True):
            _check_finite(name, own)
            call.answer(own)

    def _assign(self, component: str, calls: Sequence[Call]) -> None:
        specs = [work.spec for call in calls if isinstance(work := call.picture, Work)]
        with self._lock:
            self._rows.prepare([*specs, *(work.spec for work in self._at_work)])
        rows = [spec for spec, call in zip(specs, calls, strict=True) for _ in range(call.arguments.rows)]
        self._rows.assign(component, rows)


def _group(calls: Sequence[Call]) -> list[Call]:
    """The calls of the next pass: those that merge with the oldest one, encoders and autoencoders first.

    A picture that has been encoded joins the next pass of the denoiser. An autoencoder makes one picture at a time.
    """
    others = [call for call in calls if call.model not in DENOISERS]
    first = (others or list(calls))[0]
    if first.model.startswith("vae"):
        return [first]
    return [call for call in calls if call.model == first.model and call.arguments.key == first.arguments.key]


def _check_finite(name: str, result: Any) -> None:
    """Raises :class:`UserError` for a prediction that is NaN: the picture would be black."""
    first = result[0] if isinstance(result, tuple | list) else result
    if name in DENOISERS and isinstance(first, Tensor) and not torch.isfinite(first).all():
        raise UserError("the denoiser returned NaN or infinity: use lower weights, or --precision fp32")
