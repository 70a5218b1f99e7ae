"""Atomic writes (a crash leaves the old file or the new one), names that are reserved, file hashes and file locks."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import itertools
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..errors import REMEDIES, UserError, reason

POLL_SECONDS = 0.1
ABANDONED_SECONDS = 3600.0
"""Age after which a temporary file counts as left behind by a killed process."""
MAX_TEXT_BYTES = 2**24
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 16):
            digest.update(block)
        return digest.hexdigest()


def is_path(text: str) -> bool:
    """Whether ``text`` is a path and not a hub id (``owner/name``): by its form, or because its folder exists."""
    if text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1 or text.endswith(".safetensors"):
        return True
    return "/" in text and Path(text).parent.is_dir()


def is_special(path: Path) -> bool:
    """Whether this is a pipe, a device or a socket: opening one may wait without end, and none may be replaced."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """The UTF-8 text of a file that the user named, which may be a pipe, of at most ``limit`` bytes.

    Raises ``OSError``, ``UnicodeDecodeError``, and :class:`UserError` for a longer one, as devices are.
    """
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{path} has more than {limit >> 20} MiB: give a shorter text")
    return content.decode("utf-8-sig")


def real_path(path: str | Path) -> Path:
    """The absolute path without links. Unlike ``Path.resolve`` it raises nothing for links that form a loop."""
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def user_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` about ``path`` (disk full, no permission, a file in the way) into a :class:`UserError`."""
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "free space or choose another folder")
        raise UserError(f"cannot write {path}: {reason(error)}; {remedy}") from error


def make_folder(path: Path) -> Path:
    """Create a folder and its parents. Raises :class:`UserError` if that fails."""
    with user_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


class TakenError(UserError):
    """Another file or folder already has the name."""


def write_atomic(path: Path, content: bytes | str | Iterable[bytes | memoryview], new: bool = False) -> Path:
    """Write a temporary file in the same folder, fsync it, rename it to ``path``, fsync the folder.

    ``content`` may be an iterator of chunks, so that a large file never has to fit in memory. Text is written as UTF-8;
    a lone surrogate, as in a file name that is not UTF-8, becomes an escape. With ``new`` an existing file is never
    replaced, even if another process creates it at the same moment: raises :class:`TakenError`. Raises
    :class:`UserError` if the folder cannot be written or the disk is full; the old file is then untouched.
    """
    encoded = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    chunks = (encoded,) if isinstance(encoded, bytes) else encoded
    make_folder(path.parent)
    if is_special(path):
        raise UserError(f"cannot write {path}: it is a pipe or a device; choose another path")
    with user_errors(path):
        remove_abandoned(path.parent, glob.escape(path.name))
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # the umask applies
            with os.fdopen(handle, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            if new:
                _rename_new(temporary, path)
            else:
                temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    return path


def _rename_new(temporary: Path, path: Path) -> None:
    """Rename a file to a name that no file has."""
    try:
        try:
            os.link(temporary, path)  # unlike a rename it never replaces a file
        except FileExistsError:
            raise
        except OSError:  # a disk without hard links
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            temporary.replace(path)
        else:
            temporary.unlink()
    except FileExistsError as error:
        raise TakenError(f"{path} already exists: choose another name") from error


def write_first_free(paths: Iterable[Path], content: bytes) -> Path:
    """Write to the first of ``paths`` that no file has, and return it. Processes that do so never share a name."""
    for path in paths:
        with contextlib.suppress(TakenError):
            return write_atomic(path, content, new=True)
    raise TakenError("all names are taken: choose another folder")


def numbered(path: Path) -> Iterator[Path]:
    """``path``, then ``path-2``, ``path-3`` ..."""
    return (path if number == 1 else path.with_name(f"{path.name}-{number}") for number in itertools.count(1))


@contextlib.contextmanager
def reserved_name(folder: Path, name: str, stem: Callable[[Path], str]) -> Iterator[Path]:
    """Reserve the first of ``name``, ``name-2`` ... that nothing in ``folder`` has; yields a new folder of that name.

    ``stem`` gives the name that a file or folder takes. The new folder is the reservation: it is created exclusively
    and before the other names are looked at, so threads and processes never share a name. If it is empty at the end,
    it is removed: whoever reserved the name has put a file beside it, or failed.
    """
    for path in numbered(make_folder(folder) / name):
        with user_errors(path):
            try:
                path.mkdir()
            except FileExistsError:
                continue
            if stem(path).casefold() not in {stem(other).casefold() for other in folder.iterdir() if other != path}:
                break
            path.rmdir()
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.rmdir()


def remove_abandoned(folder: Path, names: str) -> None:
    """Remove temporary files that killed calls of :func:`write_atomic` left for the files matching ``names``.

    Only those older than :data:`ABANDONED_SECONDS`: a younger one may still be written.
    """
    for temporary in folder.glob(f".{names}.{'[0-9a-f]' * 8}"):
        with contextlib.suppress(OSError):
            if time.time() - temporary.stat().st_mtime > ABANDONED_SECONDS:
                temporary.unlink()


class NoLocksError(UserError):
    """The file system has no file locks, like some network drives."""


class FileLock:
    """An exclusive lock on a file or folder, between threads and processes; as a context manager it blocks.

    The operating system releases the lock when the holder's process ends, even if it is killed, so no pid or
    timestamp is needed. A forked child does not hold its parent's locks; a program that is started with the handle
    (``pass_fds``) does. Raises :class:`NoLocksError`, or :class:`UserError` if ``path`` cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle: int | None = None

    def try_acquire(self, shared: bool = False) -> bool:
        """Take the lock if it is free (``shared``: if there is no exclusive holder); return whether that worked."""
        make_folder(self.path.parent)
        flags = os.O_RDONLY if self.path.is_dir() else os.O_RDWR | os.O_CREAT
        with _NO_FORK:
            with user_errors(self.path):
                handle = os.open(self.path, flags, 0o666)  # the umask applies
            try:
                _lock(handle, shared)
            except OSError as error:
                os.close(handle)
                if error.errno in NO_LOCKS:
                    raise NoLocksError(
                        f"the disk of {self.path.parent} has no file locks: choose a folder on another disk"
                    ) from error
                return False
            self.handle = handle
            _HELD.add(self)
            return True

    def acquire(self, canceled: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the lock; ``False`` if ``canceled()`` became true first."""
        while not self.try_acquire():
            if canceled():
                return False
            time.sleep(POLL_SECONDS)
        return True

    def release(self) -> None:
        """Release the lock; does nothing if it is not held."""
        with _NO_FORK:
            _HELD.discard(self)
            if self.handle is not None:
                os.close(self.handle)
                self.handle = None

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


_HELD: set[FileLock] = set()
"""The locks that this process holds."""
_NO_FORK = threading.Lock()
"""Held while a lock is taken or released: no fork happens in between."""


def _close_inherited() -> None:
    """In a forked child: close the handles of the parent's locks, which the child would hold until it ends."""
    for lock in _HELD:
        if lock.handle is not None:
            os.close(lock.handle)
            lock.handle = None
    _HELD.clear()
    _NO_FORK.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_NO_FORK.acquire, after_in_parent=_NO_FORK.release, after_in_child=_close_inherited)


def _lock(handle: int, shared: bool) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        return
    fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def is_held(path: Path) -> bool:
    """Whether the lock at ``path`` is held; always false on a disk without file locks."""
    if not path.is_file():
        return False
    lock = FileLock(path)
    with contextlib.suppress(NoLocksError):
        if not lock.try_acquire(shared=True):  # shared: two concurrent checks do not see each other
            return True
    lock.release()
    return False


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder while its files are read, changed and written; other processes wait.

    Locks the folder itself where the platform can (no lock file is left behind), else a hidden file in it. Does
    nothing on a disk without file locks.
    """
    lock = FileLock(make_folder(folder) if hasattr(os, "O_DIRECTORY") else folder / ".alone.lock")
    with contextlib.suppress(NoLocksError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def sync_folder(path: Path) -> None:
    """fsync a folder (its list of files), where the platform can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
