"""Locks between processes: a file that is locked by whoever holds it, and freed by the system when that one dies."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from ..files import make_folder, user_errors

POLL_SECONDS = 0.1


class FileLock:
    """An exclusive lock on ``path``, for threads and processes alike; as a context manager it waits for its turn.

    No pid and no time stamp is trusted: the system frees the lock when its holder ends, however it ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle: int | None = None

    def try_acquire(self, shared: bool = False) -> bool:
        """Take the lock if nobody holds it (``shared``: if nobody holds it alone); says whether that worked."""
        make_folder(self.path.parent)
        with user_errors(self.path):
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
        try:
            _lock(handle, shared)
        except OSError:
            os.close(handle)
            return False
        self.handle = handle
        return True

    def acquire(self, given_up: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the lock; ``False`` if ``given_up`` said so first."""
        while not self.try_acquire():
            if given_up():
                return False
            time.sleep(POLL_SECONDS)
        return True

    def release(self) -> None:
        """Let go; nothing happens where the lock is not held."""
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_held(path: Path) -> bool:
    """Whether somebody holds the lock at ``path``."""
    if not path.is_file():
        return False
    lock = FileLock(path)
    if lock.try_acquire(shared=True):  # so that two who ask at once do not see each other
        lock.release()
        return False
    return True


def _lock(handle: int, shared: bool) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        return
    fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
