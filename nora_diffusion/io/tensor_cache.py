"""A cache on disk for tensors that can be computed again: a fault of the disk costs time, never a run.

It lies in ``NORA_CACHE``, else in the platform's cache folder; ``NORA_CACHE=off`` turns it off. Beyond
``NORA_CACHE_GB`` gigabytes (4 unless set) the entries that were not used for longest go. Processes may share it:
entries are written whole and renamed into place, and what was read is checked against the hash that stands in it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from safetensors import torch as safetensors
from torch import Tensor

from ..errors import UserError
from .files import write_atomic
from .tensor_file import named_hash

log = logging.getLogger(__name__)

DEFAULT_GB = 4.0
ABANDONED_S = 24 * 3600
"""Age after which a temporary file is taken for one that a killed process left behind."""


def folder() -> Path | None:
    """Where the cache lies, or ``None`` when it is off (or there is no home to put it in)."""
    told = os.environ.get("NORA_CACHE", "")
    if told.lower() == "off":
        return None
    if told:
        return Path(told).expanduser()
    with contextlib.suppress(RuntimeError):  # no home
        return _platform_folder() / "nora_diffusion"
    return None


def _platform_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def limit() -> int:
    """The size bound in bytes. Raises :class:`UserError` for a ``NORA_CACHE_GB`` that is no size."""
    told = os.environ.get("NORA_CACHE_GB") or str(DEFAULT_GB)
    try:
        size = int(float(told) * 1e9)
    except (ValueError, OverflowError):
        size = -1
    if size < 0:
        raise UserError(f"NORA_CACHE_GB={told} is no size: give gigabytes, for example 4")
    return size


def load(name: str) -> dict[str, Tensor] | None:
    """The tensors under ``name``; ``None`` when there are none or they are damaged, and then the file is removed."""
    path = _path(name)
    if path is None or not path.is_file():
        return None
    try:
        tensors = _checked(path.read_bytes(), name)
    except OSError:
        return None  # evicted by another process, or not ours to read
    except Exception as error:  # whatever a damaged file makes a parser say
        log.warning("the cache entry %s is damaged (%s): it is made anew", path, error)
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # the youngest now: eviction goes by last use
    return tensors


def store(name: str, tensors: dict[str, Tensor]) -> None:
    """Keep ``tensors`` under ``name`` and evict what exceeds the bound; a disk that refuses is warned of, once."""
    path, bound = _path(name), limit()
    if path is None:
        return
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    note = json.dumps({"name": name, "sha256": named_hash(plain)})
    data = safetensors.save(plain, {"nora_cache": note})
    if len(data) > bound:
        return
    try:
        write_atomic(path, data)
        _evict(path.parent, bound, keep=path)
    except (UserError, OSError) as error:
        cause = error.__cause__ or error  # the sentence of a UserError names the file, which differs each time
        reason = getattr(cause, "strerror", None) or cause
        _warn_once(f"the cache {path.parent} cannot be written ({reason}): things are computed again each time")


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def _path(name: str) -> Path | None:
    root = folder()
    return None if root is None else root / f"{name}.safetensors"


def _checked(data: bytes, name: str) -> dict[str, Tensor]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    note = json.loads(header["__metadata__"]["nora_cache"])
    tensors = safetensors.load(data)
    if note != {"name": name, "sha256": named_hash(tensors)}:
        raise ValueError("its hash is not the one written in it")
    return tensors


def _evict(root: Path, bound: int, keep: Path) -> None:
    for path, status in _entries(root, ".*.safetensors.*"):
        if time.time() - status.st_mtime > ABANDONED_S:
            path.unlink(missing_ok=True)
    entries = sorted(_entries(root, "*.safetensors"), key=lambda entry: entry[1].st_mtime)
    total = sum(status.st_size for _, status in entries)
    for path, status in entries:
        if total <= bound:
            return
        if path != keep:
            path.unlink(missing_ok=True)
            total -= status.st_size


def _entries(root: Path, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
    for path in root.glob(pattern):
        with contextlib.suppress(OSError):  # gone meanwhile
            yield path, path.stat()
