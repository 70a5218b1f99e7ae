"""Packs: the trained parameters of many subjects that share one basis, in one safetensors file.

The header stays small for any number of subjects, because it names only a few stacked tensors:

- ``index [n, 8]``: one row per subject (:class:`IndexRow`), sorted by the hash of its name: where its data is stored;
- ``stack.<g> [n_g, parameters]``: one row per subject with all its trained parameters; one stack for all subjects
  whose factors have the same names, shapes and dtype (another inner rank needs another stack);
- ``cards`` and ``previews``: the metadata (JSON) and the preview image of each subject, concatenated;
- ``shared``: one JSON document with the metadata that the cards have in common and the layout of each stack.

One subject is found by a binary search in the index, which reads some kilobytes out of gigabytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from ..io.files import real_path
from ..io.tensor_file import FLOATS, READABLE, RawTensor, TensorFile, require_finite
from ..io.untrusted import conform, parse_json
from .adapter_info import AdapterInfo, dump_info, info_from
from .keys import count_parameters

SUFFIX = ".nora_pack.safetensors"
PACK_VERSION = 1
MAX_CARD, MAX_PREVIEW = 2**20, 2**20
NAME = r"[A-Za-z0-9_-]{1,100}"


class IndexRow(NamedTuple):
    """A row of the index. ``check``: the first 8 bytes of the SHA-256 of the card and the parameters."""

    name_hash: int
    stack: int
    row: int
    card: int
    card_end: int
    preview: int
    preview_end: int
    check: int


ROW = struct.Struct(f"<{len(IndexRow._fields)}q")
"""A row of the index as bytes."""


class Layout(NamedTuple):
    """How a row of a stack is split into factors: safetensors' name of the dtype, and ``(key, shape)`` in order."""

    dtype: str
    factors: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Number of elements of each factor."""
        return {key: math.prod(shape) for key, shape in self.factors}


@dataclass
class PackedSubject:
    """One subject of a pack. ``preview()`` and ``parameters()`` read the file when they are called."""

    name: str
    info: AdapterInfo
    layout: Layout
    preview_size: int
    preview: Callable[[], bytes]
    parameters: Callable[[], bytes]


def short_hash(*parts: bytes | bytearray) -> int:
    """64 bits of the SHA-256 of ``parts``, as a signed integer."""
    return int.from_bytes(hashlib.sha256(b"".join(parts)).digest()[:8], "big", signed=True)


def metadata_of(info: AdapterInfo) -> dict[str, Any]:
    """An adapter's metadata as in its own file."""
    values: dict[str, Any] = json.loads(dump_info(info))
    return values


def pack_path(path: str | Path) -> Path:
    """The file of a pack. Raises :class:`UserError` unless it ends in ``.nora_pack.safetensors``."""
    file = Path(path).expanduser()
    if not file.name.endswith(SUFFIX):
        raise UserError(f"{file} is not a valid name for a pack: end it in {SUFFIX}")
    return real_path(file) if file.is_symlink() else file  # rewrite the pack, not the link to it


def require_pack(file: Path) -> None:
    """Raise :class:`UserError` if the file does not exist."""
    if not file.is_file():
        raise UserError(f"there is no pack at {file}")


class Pack:
    """An open pack, a context manager. Raises :class:`UserError` for a damaged file and one that is not a pack."""

    def __init__(self, file: Path) -> None:
        require_pack(file)
        self.file, self.reader = file, TensorFile(file)
        try:
            self.common, self.layouts = self._open()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            self.close()
            if isinstance(error, UserError):
                raise
            raise self._damaged(str(error)) from error

    def __enter__(self) -> Pack:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.reader.close()

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"the pack {self.file} is damaged ({reason}): copy it again")

    def _open(self) -> tuple[dict[str, Any], list[Layout]]:
        if "nora_pack" not in self.reader.metadata:
            raise UserError(f"{self.file} is not a pack")
        head = parse_json(self.reader.metadata["nora_pack"])
        if conform(head["pack_version"], int, "pack_version", 2**31) > PACK_VERSION:
            raise UserError(
                f"{self.file} has pack version {head['pack_version']}, this release reads up to {PACK_VERSION}: upgrade"
            )
        entries = self.reader.entries
        for key, dtype, dimensions in (
            ("index", "I64", 2),
            ("shared", "U8", 1),
            ("cards", "U8", 1),
            ("previews", "U8", 1),
        ):
            if entries[key].dtype != dtype or len(entries[key].shape) != dimensions:
                raise ValueError(f"{key} has an invalid dtype or shape")
        if entries["index"].shape[1] != len(IndexRow._fields):
            raise ValueError("index has an invalid shape")
        shared = self._bytes("shared", 0, entries["shared"].shape[0])
        if hashlib.sha256(shared).hexdigest() != head["shared_sha256"]:
            raise ValueError("its shared metadata does not match its hash")
        values = parse_json(shared)
        layouts = [Layout(dtype, tuple((k, tuple(s)) for k, s in factors)) for dtype, factors in values["layouts"]]
        for number, layout in enumerate(layouts):
            self._check_stack(f"stack.{number}", layout)
        return dict(values["common"]), layouts

    def _check_stack(self, key: str, layout: Layout) -> None:
        entry = self.reader.entries[key]
        conform([list(shape) for _, shape in layout.factors], list[list[int]], key, 2**31)
        conform([name for name, _ in layout.factors], list[str], key, 0)
        if entry.dtype not in FLOATS or (entry.dtype, len(entry.shape)) != (layout.dtype, 2):
            raise ValueError(f"{key} has an invalid dtype or shape")
        if entry.shape[1] != sum(layout.sizes.values()):
            raise ValueError(f"{key} does not match its layout")

    def _bytes(self, key: str, start: int, end: int) -> bytes:
        if not 0 <= start <= end <= self.reader.entries[key].shape[0]:
            raise self._damaged(f"its index points outside {key}")
        return bytes(self.reader.rows(key, start, end).data)

    def __len__(self) -> int:
        return self.reader.entries["index"].shape[0]

    def index_row(self, number: int) -> IndexRow:
        """One row of the index."""
        row = IndexRow(*ROW.unpack(self.reader.rows("index", number, number + 1).data))
        if not (0 <= row.stack < len(self.layouts) and row.card_end - row.card <= MAX_CARD):
            raise self._damaged("its index is invalid")
        if row.preview_end - row.preview > MAX_PREVIEW:
            raise self._damaged("a preview is too large")
        return row

    def __iter__(self) -> Iterator[PackedSubject]:
        """All subjects, sorted by the hash of their names. Raises :class:`UserError` if the index is wrong."""
        last = None
        for number in range(len(self)):
            row = self.index_row(number)
            subject = self._subject(row)
            if row.name_hash != short_hash(subject.name.encode()) or (last is not None and row.name_hash < last):
                raise self._damaged("its index is invalid")
            last = row.name_hash
            yield subject

    def find(self, name: str) -> PackedSubject:
        """The subject of that name. Raises :class:`UserError` if there is none."""
        wanted, low, high = short_hash(name.encode()), 0, len(self)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.index_row(middle).name_hash < wanted else (low, middle)
        while low < len(self) and (row := self.index_row(low)).name_hash == wanted:
            if (subject := self._subject(row)).name == name:
                return subject
            low += 1
        raise UserError(f"there is no subject {name!r} in {self.file}: list them with `nora-diffusion pack list`")

    def _subject(self, row: IndexRow) -> PackedSubject:
        card = self._bytes("cards", row.card, row.card_end)
        layout = self.layouts[row.stack]
        try:
            values = parse_json(card)
            name = conform(values.pop("name"), str, "name", 0)
            digest = conform(values.pop("sha256"), str, "sha256", 0)
            merged = {**self.common, **values}
            info = info_from({key: value for key, value in merged.items() if value is not None})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._damaged(f"a card: {error}") from error
        count_parameters(info, layout.sizes)
        info.path, info.sha256 = f"{self.file}#{name}", digest
        info.bytes = len(card) + sum(layout.sizes.values()) * READABLE[layout.dtype].itemsize

        def parameters() -> bytes:
            content = bytes(self.reader.rows(f"stack.{row.stack}", row.row, row.row + 1).data)
            if short_hash(card, content) != row.check:
                raise self._damaged(f"the parameters or the card of {name} do not match their hash")
            return content

        def preview() -> bytes:
            return self._bytes("previews", row.preview, row.preview_end)

        return PackedSubject(name, info, layout, row.preview_end - row.preview, preview, parameters)


def read_factors(subject: PackedSubject) -> dict[str, RawTensor]:
    """The trained factors of a subject. Raises :class:`UserError` for NaN and infinity."""
    dtype, start = subject.layout.dtype, 0
    content, tensors = memoryview(bytearray(subject.parameters())), {}
    for key, shape in subject.layout.factors:
        stop = start + math.prod(shape) * READABLE[dtype].itemsize
        tensors[key], start = RawTensor(dtype, shape, content[start:stop]), stop
    require_finite(tensors, subject.info.path)
    return tensors


def inspect_subject(file: Path, name: str) -> AdapterInfo:
    """The metadata of one subject; reads only its card."""
    with Pack(file) as pack:
        return pack.find(name).info


def read_subject(file: Path, name: str) -> dict[str, RawTensor]:
    """The trained factors of one subject; reads no other subject's."""
    with Pack(file) as pack:
        return read_factors(pack.find(name))


def list_pack(file: str | Path) -> list[AdapterInfo]:
    """The metadata of all subjects of a pack, sorted by address; reads only their cards."""
    with Pack(Path(file).expanduser()) as pack:
        return sorted((subject.info for subject in pack), key=lambda info: info.path)
