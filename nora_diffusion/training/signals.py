"""Ctrl-C and SIGTERM: the first finishes the step and saves a checkpoint, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from ..errors import Terminated


class Interrupted(Exception):
    """A signal stopped the run after ``step`` steps. ``checkpoint`` is the one to resume from, if any."""

    def __init__(self, signum: int, step: int, checkpoint: Path | None) -> None:
        self.signum = signum
        self.exit_code = 128 + signum
        self.step = step
        self.checkpoint = checkpoint
        hint = (
            f"saved {checkpoint}; run the same command with --resume_from_checkpoint latest to continue"
            if checkpoint
            else "nothing was trained yet; run the same command to start over"
        )
        super().__init__(f"stopped by {signal.Signals(signum).name} after {step} steps: {hint}")

    def as_interrupt(self) -> KeyboardInterrupt:
        """What the signal raises outside a run."""
        return Terminated() if self.signum == signal.SIGTERM else KeyboardInterrupt()


class StopRequests:
    """Context manager that records the first SIGINT or SIGTERM in ``received``; a second one has its default effect.

    Python allows signal handlers only in the main thread. In other threads, signals keep their default effect.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number

    def check(self, step: int = 0) -> None:
        """Raise :class:`Interrupted` if a signal was received; for phases with nothing to save yet."""
        if self.received is not None:
            raise Interrupted(self.received, step, None)
