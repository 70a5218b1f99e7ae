"""Ctrl-C and SIGTERM: the first lets the step finish and a checkpoint be saved, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any


class Interrupted(Exception):
    """A signal stopped the run after ``step`` steps. ``checkpoint`` is where it can go on, if anywhere."""

    def __init__(self, signum: int, step: int, checkpoint: Path | None) -> None:
        self.exit_code = 128 + signum
        self.step = step
        self.checkpoint = checkpoint
        way = (
            f"saved {checkpoint}; the same command with --resume_from_checkpoint latest goes on from there"
            if checkpoint
            else "nothing was trained yet, so the same command starts anew"
        )
        super().__init__(f"stopped by {signal.Signals(signum).name} after {step} steps: {way}")


class StopRequests:
    """Context manager that notes the first SIGINT or SIGTERM in ``received``; a second one acts as usual.

    Outside the main thread Python allows no handlers: then signals keep their usual effect.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number

    def check(self, step: int = 0) -> None:
        """Raise :class:`Interrupted` if a signal came: for phases in which there is nothing to save yet."""
        if self.received is not None:
            raise Interrupted(self.received, step, None)
