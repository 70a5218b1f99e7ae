"""The queue for the device: one job at a time, first come first served."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from ..errors import UserError
from ..io.files import FileLock

MAX_WAITING = 8
POLL_SECONDS = 0.1


class Device:
    """The queue for the device. The first :class:`Turn` in it holds the device until it leaves.

    ``lock`` is the lock file of trainings, which are separate processes: a training locks it while it runs (``None``:
    there are none). ``at_once``: turns that hold the device together, if it is a server with a queue of its own.
    """

    def __init__(self, lock: Path | None, max_waiting: int = MAX_WAITING, at_once: int = 1) -> None:
        self.max_waiting, self.at_once = max_waiting, at_once
        self._lock = FileLock(lock) if lock else None
        self._queue: list[Turn] = []
        self._changed = threading.Condition()

    def join(self, label: str) -> Turn:
        """Join the end of the queue. Others see ``label`` while this turn runs, so it must hold no secrets.

        Raises :class:`UserError` if the queue is full.
        """
        with self._changed:
            if len(self._queue) > self.max_waiting:
                raise UserError(f"the queue is full ({self.max_waiting} are waiting): try again in a moment")
            turn = Turn(self, label)
            self._queue.append(turn)
            return turn

    @property
    def busy_with(self) -> str | None:
        """Label of the running job, or None if the queue is empty."""
        with self._changed:
            if not self._queue:
                return None
            return self._queue[0].label if self._queue[0].held else "a training"

    def position(self, turn: Turn) -> int:
        """Number of turns before this one: 0 for the first, and for a turn that left."""
        with self._changed:
            return self._queue.index(turn) if turn in self._queue else 0

    def take(self, turn: Turn, seconds: float | None) -> bool:
        """Wait until the turn is first and no training runs, at most ``seconds``. True if the turn holds the device."""
        end = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            while not turn.held:
                if turn not in self._queue:
                    return False
                if turn in self._queue[: self.at_once] and self._no_training():
                    turn.held = True
                    break
                rest = POLL_SECONDS if end is None else min(POLL_SECONDS, end - time.monotonic())
                if rest <= 0:
                    return False
                self._changed.wait(rest)
            return True

    def _no_training(self) -> bool:
        """Take the lock of trainings. None runs where it cannot exist: a read-only library, a disk without locks."""
        try:
            return self._lock is None or self._lock.try_acquire()
        except UserError:
            return True

    def drop(self, turn: Turn) -> None:
        """Remove a turn from the queue, and free the device if the turn holds it."""
        with self._changed:
            if turn.held:
                turn.held = False
                if self._lock is not None:
                    self._lock.release()
            if turn in self._queue:
                self._queue.remove(turn)
            self._changed.notify_all()


class Turn:
    """A position in the queue. As a context manager it waits for the device and frees it at the end.

    A handler of the page polls ``wait(seconds)`` instead and shows ``ahead``.
    """

    def __init__(self, device: Device, label: str) -> None:
        self.label = label
        self.held = False
        self._device = device

    @property
    def ahead(self) -> int:
        """Number of turns before this one."""
        return self._device.position(self)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the device, at most ``seconds``. True if it is held now."""
        return self._device.take(self, seconds)

    def leave(self) -> None:
        """Leave the queue, whether the device is held or not. May be called twice."""
        self._device.drop(self)

    def __enter__(self) -> Turn:
        self.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
