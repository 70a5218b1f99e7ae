"""Disk cache for tensors that can be recomputed: a disk error costs time, never a run.

Location: ``NORA_CACHE``, else the platform's cache folder; ``NORA_CACHE=off`` disables it. Above ``NORA_CACHE_GB``
gigabytes (default 4) the least recently used entries are evicted. Processes may share one cache: entries are written
atomically, and every entry is verified against the hash in its header.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from safetensors import torch as safetensors
from torch import Tensor

from ..errors import UserError
from .files import remove_abandoned, write_atomic
from .tensors import named_hash

log = logging.getLogger(__name__)

DEFAULT_GB = 4.0


def folder() -> Path | None:
    """The cache folder, or ``None`` if the cache is off (or the user has no home folder)."""
    setting = os.environ.get("NORA_CACHE", "")
    if setting.lower() == "off":
        return None
    if setting:
        return Path(setting).expanduser()
    with contextlib.suppress(RuntimeError):  # no home folder
        return _platform_folder() / "nora_diffusion"
    return None


def _platform_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def limit() -> int:
    """The maximum size in bytes. Raises :class:`UserError` if ``NORA_CACHE_GB`` is not a size."""
    setting = os.environ.get("NORA_CACHE_GB") or str(DEFAULT_GB)
    try:
        size = int(float(setting) * 1e9)
    except (ValueError, OverflowError):
        size = -1
    if size < 0:
        raise UserError(f"NORA_CACHE_GB={setting} is not a size: give a number of gigabytes, for example 4")
    return size


def load(name: str) -> dict[str, Tensor] | None:
    """The tensors cached as ``name``, or ``None``. A damaged entry is deleted and counts as missing."""
    path = _path(name)
    if path is None or not path.is_file():
        return None
    try:
        tensors = _checked(path.read_bytes(), name)
    except OSError:
        return None  # evicted by another process, or no permission to read it
    except Exception as error:  # any error that a damaged file causes in a parser
        log.warning("the cache entry %s is damaged (%s) and will be recomputed", path, error)
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # eviction goes by last use
    return tensors


def store(name: str, tensors: dict[str, Tensor]) -> None:
    """Cache ``tensors`` as ``name`` and evict old entries above the size limit; a disk error warns once."""
    path, max_bytes = _path(name), limit()
    if path is None:
        return
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    checksum = json.dumps({"name": name, "sha256": named_hash(plain)})
    data = safetensors.save(plain, {"nora_cache": checksum})
    if len(data) > max_bytes:
        return
    try:
        write_atomic(path, data)
        _evict(path.parent, max_bytes, keep=path)
    except (UserError, OSError) as error:
        cause = error.__cause__ or error  # a UserError names the file, which would defeat warning once
        reason = getattr(cause, "strerror", None) or cause
        _warn_once(f"the cache {path.parent} cannot be written ({reason}): everything is recomputed each time")


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def _path(name: str) -> Path | None:
    root = folder()
    return None if root is None else root / f"{name}.safetensors"


def _checked(data: bytes, name: str) -> dict[str, Tensor]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    checksum = json.loads(header["__metadata__"]["nora_cache"])
    tensors = safetensors.load(data)
    if checksum != {"name": name, "sha256": named_hash(tensors)}:
        raise ValueError("its content does not match its hash")
    return tensors


def _evict(root: Path, max_bytes: int, keep: Path) -> None:
    """Delete the least recently used entries, except ``keep``, until the rest fits in ``max_bytes``."""
    remove_abandoned(root, "*.safetensors")
    entries = sorted(_entries(root), key=lambda entry: entry[1].st_mtime)
    total = sum(status.st_size for _, status in entries)
    for path, status in entries:
        if total <= max_bytes:
            return
        if path != keep:
            path.unlink(missing_ok=True)
            total -= status.st_size


def _entries(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in root.glob("*.safetensors"):
        with contextlib.suppress(OSError):  # another process evicted it
            yield path, path.stat()
