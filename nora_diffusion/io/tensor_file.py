"""Reading safetensors that nobody vouches for: the header is checked whole, then tensors are read one at a time.

Plain reads, not a memory map: a mapped file that another process truncates kills the reader, and what is mapped
cannot be counted. Every byte passes :meth:`TensorFile.read`.
"""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from .untrusted import is_plain, parse_json

MAX_HEADER = 10 * 2**20
MAX_TENSORS = 20_000
MAX_KEY = 500
MAX_DIMENSIONS = 8
MAX_HEADER_VALUES = 20 * MAX_TENSORS

Tensors = dict[str, Tensor]
READABLE = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "U8": torch.uint8,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")

STRANGERS = {
    b"PK\x03\x04": "is a zip archive (PyTorch checkpoints are): it may run code when opened and is not read",
    b"\x80\x02": "is a Python pickle: it may run code when opened and is not read",
    b"\x80\x03": "is a Python pickle: it may run code when opened and is not read",
    b"\x80\x04": "is a Python pickle: it may run code when opened and is not read",
    b"\x80\x05": "is a Python pickle: it may run code when opened and is not read",
    b"GGUF": "is a GGUF file: only safetensors are read",
    b"version https://git-lfs": "holds a Git LFS pointer, not weights: fetch the file itself (git lfs pull)",
}
"""What else gets saved under the name of a safetensors file, by its first bytes."""


class Entry(NamedTuple):
    """One tensor's place: safetensors' name of its dtype, its shape, its first byte and the one after its last."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


class TensorFile:
    """An open safetensors file, checked on opening; use it in a ``with``.

    ``entries``: the tensors' places by name; ``metadata``: the header's strings; ``bytes_read``: all that was read so
    far. Raises :class:`UserError` that names what is wrong: no safetensors at all, a header over 10 MB, more than
    20,000 tensors, a dtype that is not read here, tensors that overlap, leave gaps or miss their shape.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        try:
            self._raw = path.open("rb", buffering=0)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        try:
            self.size = os.fstat(self._raw.fileno()).st_size
            self.metadata, self.entries = self._header()
        except BaseException:
            self._raw.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def read(self, start: int, stop: int) -> bytearray:
        """The bytes ``start`` to ``stop`` of the file."""
        content = bytearray(stop - start)
        view, done = memoryview(content), 0
        try:
            self._raw.seek(start)
            while done < len(content) and (count := self._raw.readinto(view[done:])):
                done += count
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from error
        self.bytes_read += done
        if done < len(content):
            raise self._damaged("it ends too early")
        return content

    def tensor(self, key: str) -> Tensor:
        """One tensor, whole."""
        entry = self.entries[key]
        return self._tensor(entry, entry.start, entry.stop, entry.shape)

    def rows(self, key: str, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last`` (not included) of a tensor; only their bytes are read."""
        entry = self.entries[key]
        if not 0 <= first <= last <= entry.shape[0]:
            raise self._damaged(f"rows {first} to {last} of {key} do not exist")
        width = (entry.stop - entry.start) // max(entry.shape[0], 1)
        shape = (last - first, *entry.shape[1:])
        return self._tensor(entry, entry.start + first * width, entry.start + last * width, shape)

    def _tensor(self, entry: Entry, start: int, stop: int, shape: tuple[int, ...]) -> Tensor:
        dtype = READABLE[entry.dtype]
        if start == stop:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.read(start, stop), dtype=dtype).view(shape)

    def require_floats(self) -> None:
        """Refuse a file with a tensor of another type than a float one."""
        for key, entry in self.entries.items():
            if entry.dtype not in FLOATS:
                raise UserError(f"{self.path}: {key} has the type {entry.dtype}, not a float type")

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"{self.path} is damaged or truncated ({reason}): copy it again")

    def _header(self) -> tuple[dict[str, str], dict[str, Entry]]:
        start = bytes(self.read(0, min(64, self.size)))
        length = int.from_bytes(start[:8], "little")
        if start[8:9] != b"{":
            raise UserError(f"{self.path} {_what_else(start)}")
        if length > MAX_HEADER:
            raise UserError(f"{self.path} has a header of {length:,} bytes, more than the {MAX_HEADER:,} allowed")
        if 8 + length > self.size:
            raise self._damaged("its header ends too early")
        try:
            values = parse_json(self.read(8, 8 + length), MAX_HEADER_VALUES)
        except ValueError as error:
            raise self._damaged(f"its header: {error}") from error
        metadata = values.pop("__metadata__", {}) if isinstance(values, dict) else None
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._damaged("its header is no table of tensors")
        if len(values) > MAX_TENSORS:
            raise UserError(f"{self.path} holds {len(values):,} tensors, more than the {MAX_TENSORS:,} allowed")
        entries = {key: self._entry(key, value, 8 + length) for key, value in values.items()}
        self._check_tiling(entries, 8 + length)
        return metadata, entries

    def _entry(self, key: str, value: Any, offset: int) -> Entry:
        if len(key) > MAX_KEY or not is_plain(key):
            raise self._damaged("a tensor's name is too long or has unprintable characters")
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._damaged(f"{key} is not described by dtype, shape and data_offsets")
        dtype, shape, places = value["dtype"], value["shape"], value["data_offsets"]
        if not (_counts(shape) and _counts(places) and len(places) == 2 and len(shape) <= MAX_DIMENSIONS):
            raise self._damaged(f"{key} has no sound shape or place")
        if not isinstance(dtype, str) or dtype not in READABLE:
            raise UserError(f"{self.path}: {key} has the type {str(dtype)[:20]!r}, not a float type")
        entry = Entry(dtype, tuple(shape), offset + places[0], offset + places[1])
        if entry.numel * READABLE[dtype].itemsize != entry.stop - entry.start:
            raise self._damaged(f"{key} is not as long as its shape {entry.shape} says")
        return entry

    def _check_tiling(self, entries: dict[str, Entry], start: int) -> None:
        """The tensors must follow one another without gap or overlap up to the end of the file."""
        for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != start:
                raise self._damaged(f"{key} does not begin where the tensor before it ends")
            start = entry.stop
        if start != self.size:
            raise self._damaged(f"its tensors end at byte {start:,} of {self.size:,}")


def check_whole(path: Path) -> None:
    """Raise :class:`UserError` for a file that is no safetensors, or not as long as its header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return
    except (OSError, SafetensorError) as error:
        with path.open("rb") as file:
            start = file.read(64)
        sound = start[8:9] == b"{"
        reason = f"is damaged or truncated ({error}): copy it again" if sound else _what_else(start)
        raise UserError(f"{path} {reason}") from error


def _what_else(start: bytes) -> str:
    """What a file that begins like this is instead of safetensors."""
    for magic, message in STRANGERS.items():
        if start.startswith(magic):
            return message
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "holds a web page, not weights: download the file itself"
    return "is empty, truncated or no safetensors file: copy it again"


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**48 for size in value)


def all_finite(value: Tensor) -> bool:
    """Whether no number is NaN or infinite; needs no memory, because both show in the smallest and the largest."""
    if not value.numel():
        return True
    low, high = value.aminmax()
    return bool(low.isfinite() and high.isfinite())


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def named_hash(tensors: Tensors) -> str:
    """SHA-256 over names, shapes and bytes, whatever file the tensors lie in."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
