"""Work on the device that a page started: it waits in the queue, reports progress and can be stopped.

Gradio's own canceling frees the queue slot while a plain function keeps running. So each run has its own stop flags,
which the step callback reads.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..errors import explanation, out_of_memory
from .device import Device
from .messages import INTERNAL_ERROR, OUT_OF_MEMORY, sentence

log = logging.getLogger(__name__)

State = Literal["waiting", "working", "done", "stopped", "failed"]


class Stopped(Exception):
    """The user interrupted the run."""


class Skipped(Exception):
    """The user skipped this image."""


@dataclass(frozen=True)
class Progress:
    """A snapshot of a run. ``image`` and ``step`` count from 1; ``preview`` is a data URI.

    ``share``: how much of the work is done, from 0 to 1; 0: as much as ``image`` and ``step`` say.
    ``begun``: when the first step began (``time.monotonic``; 0: not yet).
    """

    state: State = "waiting"
    ahead: int = 0
    busy_with: str = ""
    image: int = 0
    images: int = 0
    step: int = 0
    steps: int = 0
    share: float = 0.0
    preview: str = ""
    files: tuple[Path, ...] = ()
    message: str = ""
    seconds: float = 0.0
    begun: float = 0.0

    @property
    def over(self) -> bool:
        """Whether this is the last snapshot."""
        return self.state in ("done", "stopped", "failed")


class Run:
    """Work in its own thread. ``work(run)`` calls ``run.report(...)`` and ``run.check()``."""

    def __init__(self, device: Device, label: str, work: Callable[[Run], object]) -> None:
        self.device = device
        self.progress = Progress()
        self._work = work
        self._stop = threading.Event()
        self._skip = threading.Event()
        self._changed = threading.Condition()
        self._version = 0
        self._turn = device.join(label)
        self._thread = threading.Thread(target=self._execute, name=f"run {label}", daemon=True)
        self._thread.start()

    def interrupt(self) -> None:
        """Stop at the next step, or leave the queue."""
        self._stop.set()

    def skip(self) -> None:
        """Abandon the current image and continue with the next one."""
        self._skip.set()

    def check(self) -> None:
        """Raise :class:`Stopped` or :class:`Skipped` if the user asked for it. Called after every step."""
        self.check_stop()
        if self._skip.is_set():
            self._skip.clear()
            raise Skipped

    def check_stop(self) -> None:
        """Raise :class:`Stopped` if the user asked for it. Called many times within a step."""
        if self._stop.is_set():
            raise Stopped

    def report(self, **values: object) -> None:
        """Update the snapshot and wake all followers."""
        if values.get("steps") and not self.progress.begun:
            values["begun"] = time.monotonic()
        with self._changed:
            self.progress = replace(self.progress, **values)  # type: ignore[arg-type]
            self._version += 1
            self._changed.notify_all()

    def follow(self, every: float = 1.0) -> Iterator[Progress]:
        """Yield snapshots up to the last one. Closing this iterator (a closed page) stops the run."""
        seen = -1
        try:
            while True:
                with self._changed:
                    if self._version == seen:
                        self._changed.wait(every)
                    seen, now = self._version, self.progress
                yield now
                if now.over:
                    return
        finally:
            if not self.progress.over:
                self.interrupt()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the run is over."""
        self._thread.join(timeout)

    def _execute(self) -> None:
        started = time.monotonic()
        try:
            self._wait_in_queue()
            started = time.monotonic()
            self.report(state="working", ahead=0, busy_with="")
            self._work(self)
            self.report(state="done", seconds=time.monotonic() - started, preview="")
        except Stopped:
            self.report(state="stopped", seconds=time.monotonic() - started, message="Interrupted.", preview="")
        except Exception as error:
            self._fail(error)
        finally:
            self._turn.leave()

    def _wait_in_queue(self) -> None:
        while not self._turn.wait(0.2):
            self.check_stop()
            now = (self._turn.ahead, self.device.busy_with or "")
            if now != (self.progress.ahead, self.progress.busy_with):
                self.report(ahead=now[0], busy_with=now[1])
        self.check_stop()
        self._skip.clear()  # there was no image to skip yet

    def _fail(self, error: Exception) -> None:
        if out_of_memory(error):
            error.__traceback__ = None  # its frames hold the tensors
            free_memory()
            self.report(state="failed", message=OUT_OF_MEMORY, preview="")
            return
        text = explanation(error)
        if text is None:
            log.error("a run failed", exc_info=error)
        self.report(state="failed", message=INTERNAL_ERROR if text is None else sentence(text), preview="")


def free_memory() -> None:
    """Collect garbage and return cached GPU memory."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


class Runs:
    """The last run for each key: user, page and kind of work. A button stops only the run under its own key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[tuple[str, str, str], Run] = {}

    def put(self, key: tuple[str, str, str], run: Run) -> None:
        """Store a run and drop those that are over."""
        with self._lock:
            self._last = {k: r for k, r in self._last.items() if not r.progress.over}
            self._last[key] = run

    def get(self, key: tuple[str, str, str]) -> Run | None:
        """The last run under this key."""
        with self._lock:
            return self._last.get(key)
