"""Writing files so that a crash leaves the old one or the new one, never half of either; and their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import UserError


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 16):
            digest.update(block)
        return digest.hexdigest()


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


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process is in here with the same folder; for read, change and write of what lies in it.

    The folder itself is locked, so that nothing is left behind. Where the platform cannot, this does nothing.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with user_errors(folder):
        handle = os.open(make_folder(folder), os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a network drive without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk, where the platform can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
