"""Work on the device that a page started: it waits in line, says how far it is, and can be stopped.

Gradio's own canceling would free the place in the queue while a plain function runs on, so the work has stop flags
of its own, which its step callback reads.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..errors import UserError, out_of_memory
from .device import Device, Turn
from .messages import INSIDE, OUT_OF_MEMORY, sentence

log = logging.getLogger(__name__)

State = Literal["waiting", "working", "done", "stopped", "failed"]


class Stopped(Exception):
    """The user interrupted."""


class Skipped(Exception):
    """The user skipped this picture."""


@dataclass(frozen=True)
class Progress:
    """A snapshot of a run. ``picture`` and ``step`` count from 1; ``preview`` is a data URI."""

    state: State = "waiting"
    ahead: int = 0
    busy_with: str = ""
    picture: int = 0
    pictures: int = 0
    step: int = 0
    steps: int = 0
    preview: str = ""
    files: tuple[Path, ...] = ()
    message: str = ""
    seconds: float = 0.0

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ("done", "stopped", "failed")


@dataclass
class Run:
    """One piece of work in a thread of its own. ``work(run)`` calls ``run.report(...)`` and ``run.check()``."""

    device: Device
    label: str
    work: Callable[[Run], object]
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._skip = threading.Event()
        self._changed = threading.Condition()
        self._version = 0
        self._turn: Turn = self.device.join(self.label)
        self._thread = threading.Thread(target=self._live, name=f"run {self.label}", daemon=True)
        self._thread.start()

    def interrupt(self) -> None:
        """End at the next step, or leave the line."""
        self._stop.set()

    def skip(self) -> None:
        """Leave the picture that is being made and go on with the next one."""
        self._skip.set()

    def check(self) -> None:
        """Raises :class:`Stopped` or :class:`Skipped` once the user asked for it; called after every step."""
        self._check_stop()
        if self._skip.is_set():
            self._skip.clear()
            raise Skipped

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def report(self, **values: object) -> None:
        """Change the snapshot and wake whoever follows."""
        with self._changed:
            self.progress = replace(self.progress, **values)  # type: ignore[arg-type]
            self._version += 1
            self._changed.notify_all()

    def follow(self, every: float = 1.0) -> Iterator[Progress]:
        """Snapshots as they come, the last one included. Closing this iterator (a closed tab) stops the run."""
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
        """Wait for the end."""
        self._thread.join(timeout)

    def _live(self) -> None:
        started = time.monotonic()
        try:
            self._wait_in_line()
            started = time.monotonic()
            self.report(state="working", ahead=0, busy_with="")
            self.work(self)
            self.report(state="done", seconds=time.monotonic() - started, preview="")
        except Stopped:
            self.report(state="stopped", seconds=time.monotonic() - started, message="Interrupted.", preview="")
        except UserError as error:
            self.report(state="failed", message=sentence(error), preview="")
        except Exception as error:
            self._failed(error)
        finally:
            self._turn.leave()

    def _wait_in_line(self) -> None:
        while not self._turn.wait(0.2):
            self._check_stop()
            now = (self._turn.ahead, self.device.busy_with or "")
            if now != (self.progress.ahead, self.progress.busy_with):
                self.report(ahead=now[0], busy_with=now[1])
        self._check_stop()
        self._skip.clear()  # there was no picture yet to leave

    def _failed(self, error: Exception) -> None:
        if out_of_memory(error):
            error.__traceback__ = None  # its frames hold the tensors
            free_memory()
            self.report(state="failed", message=OUT_OF_MEMORY, preview="")
            return
        log.error("a run failed", exc_info=error)
        self.report(state="failed", message=INSIDE, preview="")


def free_memory() -> None:
    """Give back what nothing refers to."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


class Runs:
    """The last run of each user, page and kind of work, so that a button can stop it and no other one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[tuple[str, str, str], Run] = {}

    def put(self, key: tuple[str, str, str], run: Run) -> None:
        """Remember a run; those that are over are forgotten."""
        with self._lock:
            self._last = {k: r for k, r in self._last.items() if not r.progress.over}
            self._last[key] = run

    def get(self, key: tuple[str, str, str]) -> Run | None:
        """The last run under this key."""
        with self._lock:
            return self._last.get(key)
