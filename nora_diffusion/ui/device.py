"""One job at a time on the device, first come first served, whoever asks."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from ..errors import UserError
from ..io.files import FileLock

MAX_WAITING = 8
POLL_SECONDS = 0.1


class Device:
    """The line before the device. The first :class:`Turn` in it holds the device until it leaves.

    ``lock`` is the file that trainings, which are processes of their own, lock as long as they run.
    """

    def __init__(self, lock: Path, max_waiting: int = MAX_WAITING) -> None:
        self.max_waiting = max_waiting
        self._lock = FileLock(lock)
        self._line: list[Turn] = []
        self._moved = threading.Condition()

    def join(self, label: str) -> Turn:
        """Take the last place in the line; ``label`` tells those behind what runs, so it must hold no secrets.

        Raises :class:`UserError` when the line is full.
        """
        with self._moved:
            if len(self._line) > self.max_waiting:
                raise UserError(f"the queue is full ({self.max_waiting} are waiting): try again in a moment")
            turn = Turn(self, label)
            self._line.append(turn)
            return turn

    @property
    def busy_with(self) -> str | None:
        """What runs now, as far as it is known here."""
        with self._moved:
            if not self._line:
                return None
            return self._line[0].label if self._line[0].held else "a training"

    def position(self, turn: Turn) -> int:
        """How many come before a turn: 0 for the first, and for one that left."""
        with self._moved:
            return self._line.index(turn) if turn in self._line else 0

    def take(self, turn: Turn, seconds: float | None) -> bool:
        """Wait until the turn is the first one and no training runs, at most so long; whether it has the device."""
        end = None if seconds is None else time.monotonic() + seconds
        with self._moved:
            while not turn.held:
                if turn not in self._line:
                    return False
                if self._line[0] is turn and self._lock.try_acquire():
                    turn.held = True
                    break
                rest = POLL_SECONDS if end is None else min(POLL_SECONDS, end - time.monotonic())
                if rest <= 0:
                    return False
                self._moved.wait(rest)
            return True

    def drop(self, turn: Turn) -> None:
        """Take a turn out of the line, and free the device if it had it."""
        with self._moved:
            if turn.held:
                self._lock.release()
                turn.held = False
            if turn in self._line:
                self._line.remove(turn)
            self._moved.notify_all()


class Turn:
    """A place in the line; as a context manager it waits for the device and hands it on at the end.

    Whoever waits in a handler of the page polls ``wait(seconds)`` and shows ``ahead``.
    """

    def __init__(self, device: Device, label: str) -> None:
        self.label = label
        self.held = False
        self._device = device

    @property
    def ahead(self) -> int:
        """How many come first."""
        return self._device.position(self)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the device, at most so long; whether it is held now."""
        return self._device.take(self, seconds)

    def leave(self) -> None:
        """Give the place up, held or not; may be called twice."""
        self._device.drop(self)

    def __enter__(self) -> Turn:
        self.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
