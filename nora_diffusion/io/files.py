"""Writing files so that a crash leaves the old one or the new one, never half of either; hashes and locks."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..errors import UserError

POLL_SECONDS = 0.1
ABANDONED_SECONDS = 3600.0
"""After which a half-written file that nobody has touched is nobody's."""
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 16):
            digest.update(block)
        return digest.hexdigest()


def is_path(text: str) -> bool:
    """Whether a name that may be a hub id, ``owner/name``, means a path: by its form, or as its folder is here."""
    if text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1 or text.endswith(".safetensors"):
        return True
    return "/" in text and Path(text).parent.is_dir()


@contextlib.contextmanager
def user_errors(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` about ``path`` (full disk, no permission, a file in the way) into a sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {path}: {reason}; free space or choose another place") from error


def make_folder(path: Path) -> Path:
    """Create a folder with its parents. Raises :class:`UserError` where that is impossible."""
    with user_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def write_atomic(path: Path, content: bytes | str | Iterable[bytes]) -> Path:
    """Write a file by a temporary one in the same folder, fsync, rename, and fsync of the folder.

    ``content`` may come in pieces, so that a large file need never be in memory. Raises :class:`UserError` where the
    folder cannot be written or the disk is full; the old file is then untouched.
    """
    whole = content.encode() if isinstance(content, str) else content
    pieces = (whole,) if isinstance(whole, bytes) else whole
    make_folder(path.parent)
    with user_errors(path):
        _sweep(path)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # less the process's own mask
            with os.fdopen(handle, "wb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    return path


def _sweep(path: Path) -> None:
    """Remove what writers of this file left that were killed on their way, unless it may still be on its way."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                left.unlink()


class NoLocksError(UserError):
    """The disk has no file locks, as some network drives."""


class FileLock:
    """An exclusive lock on ``path``, for threads and processes alike; as a context manager it waits for its turn.

    No pid and no time stamp is trusted: the system frees the lock when its holder ends, however it ends. Raises
    :class:`NoLocksError`, or :class:`UserError` where the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle: int | None = None

    def try_acquire(self, shared: bool = False) -> bool:
        """Take the lock if nobody holds it (``shared``: if nobody holds it alone); says whether that worked."""
        make_folder(self.path.parent)
        flags = os.O_RDONLY if self.path.is_dir() else os.O_RDWR | os.O_CREAT
        with user_errors(self.path):
            handle = os.open(self.path, flags, 0o666)  # less the process's own mask
        try:
            _lock(handle, shared)
        except OSError as error:
            os.close(handle)
            if error.errno in NO_LOCKS:
                raise NoLocksError(
                    f"the disk of {self.path.parent} has no file locks: choose a folder elsewhere"
                ) from error
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


def _lock(handle: int, shared: bool) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        return
    fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def is_held(path: Path) -> bool:
    """Whether somebody holds the lock at ``path``; on a disk without locks nobody does."""
    if not path.is_file():
        return False
    lock = FileLock(path)
    with contextlib.suppress(NoLocksError):
        if not lock.try_acquire(shared=True):  # so that two who ask at once do not see each other
            return True
    lock.release()
    return False


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process is in here with the same folder; for read, change and write of what lies in it.

    The folder itself is locked where the platform can, so that nothing is left behind. On a disk without locks this
    does nothing.
    """
    lock = FileLock(make_folder(folder) if hasattr(os, "O_DIRECTORY") else folder / ".alone.lock")
    with contextlib.suppress(NoLocksError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk, where the platform can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
