"""Packs: the trained numbers of many subjects that share one basis, in one safetensors file.

The header is small whatever the number of subjects, because it names only a few stacked tensors:

- ``index [n, 8]``: a row for each subject, sorted by the hash of its name, that says where its parts lie;
- ``stack.<g> [n_g, numbers]``: all trained numbers of one subject in a row, for the subjects whose factors have the
  same names, shapes and dtype (another inner rank is another stack);
- ``cards`` and ``previews``: a JSON document and a picture of each subject, end to end;
- ``shared``: one JSON document with what the cards have in common and the layout of each stack.

One subject is found by bisecting the index: some kilobytes out of gigabytes are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from ..io.tensor_file import FLOATS, READABLE, TensorFile, Tensors, all_finite
from ..io.untrusted import conform, parse_json
from .adapter_info import AdapterInfo, dump_info, info_from
from .keys import count_parameters

SUFFIX = ".nora_pack.safetensors"
PACK_VERSION = 1
MAX_CARD, MAX_PREVIEW = 2**20, 2**20
NAME = r"[A-Za-z0-9_-]{1,100}"


class IndexRow(NamedTuple):
    """A row of the index. ``check``: the first 8 bytes of the SHA-256 of card and numbers."""

    name_hash: int
    stack: int
    row: int
    card: int
    card_end: int
    preview: int
    preview_end: int
    check: int


class Layout(NamedTuple):
    """How a row of a stack is cut into factors: safetensors' dtype, and ``(key, shape)`` in order."""

    dtype: str
    factors: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers of each factor."""
        sizes = {}
        for key, shape in self.factors:
            sizes[key] = 1
            for side in shape:
                sizes[key] *= side
        return sizes


@dataclass
class PackedSubject:
    """One subject: what is said of it, and its parts, read when asked for."""

    name: str
    info: AdapterInfo
    layout: Layout
    preview_size: int
    preview: Callable[[], bytes]
    numbers: Callable[[], bytes]


def short_hash(*parts: bytes | bytearray) -> int:
    """64 bits of the SHA-256 of ``parts``, as a signed number."""
    return int.from_bytes(hashlib.sha256(b"".join(parts)).digest()[:8], "big", signed=True)


def document(info: AdapterInfo) -> dict[str, Any]:
    """An adapter's own document, as its file holds it."""
    values: dict[str, Any] = json.loads(dump_info(info))
    return values


def require_pack(file: Path) -> None:
    """Raise :class:`UserError` where there is no file."""
    if not file.is_file():
        raise UserError(f"there is no pack at {file}")


class Pack:
    """An open pack; use it in a ``with``. Raises :class:`UserError` for a file that is none or a damaged one."""

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
        self.reader.__exit__(None, None, None)

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"the pack {self.file} is damaged ({reason}): copy it again")

    def _open(self) -> tuple[dict[str, Any], list[Layout]]:
        if "nora_pack" not in self.reader.metadata:
            raise UserError(f"{self.file} is no pack")
        head = parse_json(self.reader.metadata["nora_pack"])
        if conform(head["pack_version"], int, "pack_version", 2**31) > PACK_VERSION:
            raise UserError(f"{self.file} is of pack version {head['pack_version']}: upgrade to read it")
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
            raise ValueError("its shared part has changed")
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
            raise ValueError(f"{key} does not fit its layout")

    def _bytes(self, key: str, start: int, end: int) -> bytes:
        if not 0 <= start <= end <= self.reader.entries[key].shape[0]:
            raise self._damaged(f"its index points outside {key}")
        return self.reader.rows(key, start, end).numpy().tobytes()

    def __len__(self) -> int:
        return self.reader.entries["index"].shape[0]

    def place(self, row: int) -> IndexRow:
        """One row of the index."""
        place = IndexRow(*self.reader.rows("index", row, row + 1)[0].tolist())
        if not (0 <= place.stack < len(self.layouts) and place.card_end - place.card <= MAX_CARD):
            raise self._damaged("its index is not sound")
        if place.preview_end - place.preview > MAX_PREVIEW:
            raise self._damaged("a preview is too large")
        return place

    def __iter__(self) -> Iterator[PackedSubject]:
        """All subjects, by the hash of their names; raises where the index would not let them be found."""
        last = None
        for row in range(len(self)):
            place = self.place(row)
            subject = self._subject(place)
            if place.name_hash != short_hash(subject.name.encode()) or (last is not None and place.name_hash < last):
                raise self._damaged("its index is not sound")
            last = place.name_hash
            yield subject

    def find(self, name: str) -> PackedSubject:
        """The subject of that name. Raises :class:`UserError` where there is none."""
        wanted, low, high = short_hash(name.encode()), 0, len(self)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.place(middle).name_hash < wanted else (low, middle)
        while low < len(self) and (place := self.place(low)).name_hash == wanted:
            if (subject := self._subject(place)).name == name:
                return subject
            low += 1
        raise UserError(
            f"there is no subject {name!r} in {self.file}: `nora-diffusion pack list` shows those there are"
        )

    def _subject(self, place: IndexRow) -> PackedSubject:
        card = self._bytes("cards", place.card, place.card_end)
        layout = self.layouts[place.stack]
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

        def numbers() -> bytes:
            row = self.reader.rows(f"stack.{place.stack}", place.row, place.row + 1).view(-1)
            content = row.view(READABLE["U8"]).numpy().tobytes()
            if short_hash(card, content) != place.check:
                raise self._damaged(f"the numbers or the card of {name} have changed")
            return content

        def preview() -> bytes:
            return self._bytes("previews", place.preview, place.preview_end)

        return PackedSubject(name, info, layout, place.preview_end - place.preview, preview, numbers)


def cut(subject: PackedSubject) -> Tensors:
    """The factors of a subject."""
    import torch

    row = torch.frombuffer(bytearray(subject.numbers()), dtype=READABLE[subject.layout.dtype])
    if not all_finite(row):
        raise UserError(f"{subject.info.path} holds NaN or infinity: the adapter is broken")
    parts = row.split(list(subject.layout.sizes.values()))
    return {key: part.view(shape) for (key, shape), part in zip(subject.layout.factors, parts, strict=True)}


def inspect_subject(file: Path, name: str) -> AdapterInfo:
    """What a pack says of one subject; reads its card only."""
    with Pack(file) as pack:
        return pack.find(name).info


def read_subject(file: Path, name: str) -> Tensors:
    """The trained factors of one subject; reads its numbers only."""
    with Pack(file) as pack:
        return cut(pack.find(name))


def list_pack(file: str | Path) -> list[AdapterInfo]:
    """What a pack says of its subjects, in the order of their addresses; reads cards only."""
    with Pack(Path(file).expanduser()) as pack:
        return sorted((subject.info for subject in pack), key=lambda info: info.path)
