"""Reading untrusted safetensors files: the whole header is checked first, then tensors are read one by one.

Plain reads instead of a memory map: if another process truncates a mapped file, the reader crashes, and mapped memory
cannot be measured. Every byte passes through :meth:`TensorFile.read`. Files are read and checked without torch, whose
import takes seconds: :meth:`RawTensor.tensor` imports it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError, reason
from .files import is_special
from .untrusted import clean, parse_json

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER = 10 * 2**20
MAX_TENSORS = 20_000
MAX_KEY = 500
MAX_DIMENSIONS = 8
MAX_HEADER_VALUES = 20 * MAX_TENSORS


class Dtype(NamedTuple):
    """A dtype: its name in torch, bytes of an element, and the bits that are all set in NaN and infinity (0: none)."""

    name: str
    itemsize: int
    exponent: int = 0


READABLE = {
    "F64": Dtype("float64", 8, 0x7FF0 << 48),
    "F32": Dtype("float32", 4, 0x7F80 << 16),
    "F16": Dtype("float16", 2, 0x7C00),
    "BF16": Dtype("bfloat16", 2, 0x7F80),
    "F8_E4M3": Dtype("float8_e4m3fn", 1, 0x7F),  # has no infinity: NaN are all bits but the sign
    "F8_E5M2": Dtype("float8_e5m2", 1, 0x7C),
    "I64": Dtype("int64", 8),
    "I32": Dtype("int32", 4),
    "U8": Dtype("uint8", 1),
}
FLOATS = ("F64", "F32", "F16", "BF16")
"""What the files of this toolkit hold."""
FLOATS_8 = ("F8_E4M3", "F8_E5M2")
"""What other tools' files may hold as well: torch computes nothing in them, fp16 has all their values."""
BLOCK = 2**16
"""Elements that :meth:`RawTensor.is_finite` looks at together: they stay in the processor's cache."""

OTHER_FORMATS = {
    b"PK\x03\x04": "is a zip archive (PyTorch checkpoints are): it may run code when opened and is not read",
    **{
        bytes([0x80, protocol]): "is a Python pickle: it may run code when opened and is not read"
        for protocol in range(2, 6)
    },
    b"GGUF": "is a GGUF file: only safetensors are read",
    b"version https://git-lfs": "is a Git LFS pointer, not weights: fetch the file itself (git lfs pull)",
}
"""Messages about other formats that are found in files named ``.safetensors``, by the file's first bytes."""


class Entry(NamedTuple):
    """A tensor in the header: safetensors' name of its dtype, its shape and its byte range ``[start, stop)``."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class RawTensor(NamedTuple):
    """A tensor as it stands in a file: safetensors' name of its dtype, its shape and its bytes (little-endian)."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview

    def tensor(self) -> Tensor:
        """As a tensor of torch that shares the bytes."""
        import torch  # late: describing and checking a file needs no torch

        dtype = getattr(torch, READABLE[self.dtype].name)
        if not self.data:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(self.data, dtype=dtype).view(self.shape)

    def is_finite(self) -> bool:
        """Whether it holds neither NaN nor infinity."""
        import numpy as np  # late: a header alone needs no numpy

        _, itemsize, exponent = READABLE[self.dtype]
        bits = np.frombuffer(self.data, f"<u{itemsize}")
        blocks = (bits[start : start + BLOCK] & exponent for start in range(0, len(bits), BLOCK))
        return not exponent or all(int(block.max()) < exponent for block in blocks)


RawTensors = Mapping[str, RawTensor]


class TensorFile:
    """An open safetensors file, a context manager. Opening it checks the header.

    ``entries``: the tensors by name; ``metadata``: the header's strings; ``bytes_read``: total bytes read so far.
    Raises :class:`UserError` if the file is not safetensors, its header is over 10 MB or has more than 20,000 tensors,
    a dtype is not supported, or tensors overlap, leave gaps or do not match their shapes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        if is_special(path):
            raise UserError(f"cannot read {path}: it is a pipe or a device, not a file")
        try:
            self._raw = path.open("rb", buffering=0)
        except OSError as error:
            raise UserError(f"cannot read {path}: {reason(error)}") from error
        try:
            self.size = os.fstat(self._raw.fileno()).st_size
            self.metadata, self.entries = self._header()
        except BaseException:
            self._raw.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._raw.close()

    @property
    def closed(self) -> bool:
        """Whether the file is closed."""
        return self._raw.closed

    def read(self, start: int, stop: int) -> bytearray:
        """Bytes ``[start, stop)`` of the file."""
        content = bytearray(stop - start)
        view, done = memoryview(content), 0
        try:
            self._raw.seek(start)
            while done < len(content) and (count := self._raw.readinto(view[done:])):
                done += count
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {reason(error)}") from error
        self.bytes_read += done
        if done < len(content):
            raise self._damaged("it ends too early")
        return content

    def read_all(self) -> tuple[dict[str, RawTensor], str]:
        """All tensors, and the SHA-256 of the whole file in hex, which is read once."""
        digest, tensors = self._header_digest.copy(), {}
        for key in sorted(self.entries, key=lambda key: self.entries[key].start):  # they follow each other
            tensors[key] = self.raw(key)
            digest.update(tensors[key].data)
        return tensors, digest.hexdigest()

    def raw(self, key: str) -> RawTensor:
        """Read a whole tensor."""
        entry = self.entries[key]
        return RawTensor(entry.dtype, entry.shape, self.read(entry.start, entry.stop))

    def tensor(self, key: str) -> Tensor:
        """Read a whole tensor as one of torch."""
        return self.raw(key).tensor()

    def rows(self, key: str, first: int, last: int) -> RawTensor:
        """Rows ``[first, last)`` of a tensor; only their bytes are read."""
        entry = self.entries[key]
        if not 0 <= first <= last <= entry.shape[0]:
            raise self._damaged(f"rows {first} to {last} of {key} do not exist")
        width = (entry.stop - entry.start) // max(entry.shape[0], 1)
        content = self.read(entry.start + first * width, entry.start + last * width)
        return RawTensor(entry.dtype, (last - first, *entry.shape[1:]), content)

    def require_floats(self, floats: Sequence[str] = FLOATS, others: Mapping[str, Sequence[str]] | None = None) -> None:
        """Raise :class:`UserError` if a tensor's dtype is not one of ``floats``.

        ``others``: dtypes that are allowed too, by the end of a tensor's key.
        """
        for key, entry in self.entries.items():
            if entry.dtype not in floats and not any(
                key.endswith(end) and entry.dtype in allowed for end, allowed in (others or {}).items()
            ):
                raise UserError(
                    f"{self.path}: {key} has the dtype {entry.dtype}, which is not a float dtype of adapters"
                )

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"{self.path} is damaged or truncated ({reason}): copy it again")

    def _header(self) -> tuple[dict[str, str], dict[str, Entry]]:
        start = bytes(self.read(0, min(64, self.size)))
        length = int.from_bytes(start[:8], "little")
        if start[8:9] != b"{":
            raise UserError(f"{self.path} {_other_format(start)}")
        if length > MAX_HEADER:
            raise UserError(f"{self.path} has a header of {length:,} bytes, more than the {MAX_HEADER:,} allowed")
        if 8 + length > self.size:
            raise self._damaged("its header ends too early")
        header = start[8 : 8 + length] + self.read(len(start), max(8 + length, len(start)))
        self._header_digest = hashlib.sha256(start[:8] + header)
        try:
            values = parse_json(header, MAX_HEADER_VALUES)
        except ValueError as error:
            raise self._damaged(f"its header: {error}") from error
        metadata = values.pop("__metadata__", {}) if isinstance(values, dict) else None
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._damaged("its header is not a table of tensors")
        if len(values) > MAX_TENSORS:
            raise UserError(f"{self.path} holds {len(values):,} tensors, more than the {MAX_TENSORS:,} allowed")
        entries = {key: self._entry(key, value, 8 + length) for key, value in values.items()}
        self._check_tiling(entries, 8 + length)
        return metadata, entries

    def _entry(self, key: str, value: Any, data_start: int) -> Entry:
        if len(key) > MAX_KEY or clean(key) != key:
            raise self._damaged("a tensor's name is too long or has unprintable characters")
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._damaged(f"{key} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2 and len(shape) <= MAX_DIMENSIONS):
            raise self._damaged(f"{key} has an invalid shape or data_offsets")
        if not isinstance(dtype, str) or dtype not in READABLE:
            raise UserError(f"{self.path}: {key} has the dtype {str(dtype)[:20]!r}, which is not a float dtype")
        entry = Entry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])
        if entry.numel * READABLE[dtype].itemsize != entry.stop - entry.start:
            raise self._damaged(f"{key} does not have the size of its shape {entry.shape}")
        return entry

    def _check_tiling(self, entries: dict[str, Entry], start: int) -> None:
        """Require tensors that follow each other, without gap or overlap, up to the end of the file."""
        for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != start:
                raise self._damaged(f"{key} does not start where the previous tensor ends")
            start = entry.stop
        if start != self.size:
            raise self._damaged(f"its tensors end at byte {start:,} of {self.size:,}")


def header_bytes(entries: Mapping[str, Any]) -> bytes:
    """A safetensors header as bytes: its length and its JSON, padded so that the tensors behind it are aligned."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def check_complete(path: Path) -> None:
    """Raise :class:`UserError` if a file is not safetensors or does not have the size that its header states.

    For a base's weights, which are trusted: the checks are those of the ``safetensors`` library.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return
    except (OSError, SafetensorError) as error:
        with path.open("rb") as file:
            start = file.read(64)
        has_header = start[8:9] == b"{"
        reason = f"is damaged or truncated ({error}): copy it again" if has_header else _other_format(start)
        raise UserError(f"{path} {reason}") from error


def _other_format(start: bytes) -> str:
    """What a file is instead of safetensors, by its first bytes."""
    for magic, message in OTHER_FORMATS.items():
        if start.startswith(magic):
            return message
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not weights: download the file itself"
    return "is empty, truncated or not a safetensors file: copy it again"


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**48 for size in value)


def require_finite(tensors: RawTensors, path: str | Path) -> None:
    """Raise :class:`UserError` if a tensor read from ``path`` holds NaN or infinity."""
    damaged = next((key for key, value in tensors.items() if not value.is_finite()), None)
    if damaged:
        raise UserError(f"{path}: {damaged} holds NaN or infinity: the adapter is damaged")


def raw_hash(tensors: RawTensors) -> str:
    """:func:`.tensors.named_hash` of tensors in a file."""
    return hash_of((k, v.shape, READABLE[v.dtype].name, v.data) for k, v in sorted(tensors.items()))


def hash_of(tensors: Iterable[tuple[str, tuple[int, ...], str, bytes | bytearray | memoryview]]) -> str:
    """SHA-256 of the names, shapes, dtypes (as torch names them) and bytes of tensors, in the given order."""
    digest = hashlib.sha256()
    for key, shape, dtype, data in tensors:
        digest.update(f"{key}{shape}torch.{dtype}".encode())
        digest.update(data)
    return digest.hexdigest()
