"""Creating and changing packs. Every change rewrites the file and replaces the old one atomically.

Processes that change packs in the same folder wait for each other.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save

from ..errors import UserError
from ..io.files import locked_folder, user_errors, write_atomic
from ..io.tensor_file import READABLE, RawTensors, header_bytes, raw_hash
from ..pipelines.fingerprints import same_weights
from .adapter_file import (
    BASIS_FOLDER,
    complete,
    given_name,
    inspect_adapter,
    open_adapter,
    read_tensors,
    require_vacant,
    split_address,
)
from .adapter_info import AdapterInfo, dump_info
from .adapter_writing import write_adapter, write_basis
from .keys import frozen_factors, is_frozen
from .model_card import write_card
from .packs import (
    MAX_PREVIEW,
    NAME,
    PACK_VERSION,
    ROW,
    IndexRow,
    Layout,
    Pack,
    PackedSubject,
    metadata_of,
    pack_path,
    require_pack,
    short_hash,
)

MAX_LAYOUTS = 100
PREVIEWS = {".png": b"\x89PNG\r\n\x1a\n", ".jpg": b"\xff\xd8\xff", ".webp": b"RIFF"}
SHARED_FIELDS = ("format", "format_version", "base", "base_fingerprint", "basis", "basis_sha256", "components",
                 "conv_shapes", "versions", "license")  # fmt: skip
"""Metadata that subjects of a pack usually have in common; a card holds only what differs."""

Adapters = Mapping[str, str | Path] | Sequence[str | Path | tuple[str, str | Path]]
"""Files, folders or addresses. A mapping or a pair gives an adapter's name in the pack, else its own is used."""


def create_pack(path: str | Path, adapters: Adapters, basis_dir: str | Path | None = None) -> Path:
    """Write a new pack of adapters and return its path. Their basis is written to ``bases/`` beside it.

    Raises :class:`UserError` if the adapters differ in basis or base, one has no frozen basis, a name occurs twice, or
    the file exists.
    """
    file = pack_path(path)
    _require_new(file)  # also before reading, which takes a while for thousands of adapters
    with Spool(file.parent) as spool:
        subjects, bases = _read_adapters(adapters, basis_dir, spool)
        _check_together(file, subjects)
        with locked_folder(file.parent):
            _require_new(file)
            return _write(file, subjects, bases)


def add_to_pack(path: str | Path, adapters: Adapters, basis_dir: str | Path | None = None) -> Path:
    """Add adapters to a pack. Raises :class:`UserError` like :func:`create_pack`, or if there is no pack."""
    file = pack_path(path)
    require_pack(file)
    with Spool(file.parent) as spool:
        added, bases = _read_adapters(adapters, basis_dir, spool)
        with locked_folder(file.parent), Pack(file) as pack:
            subjects = [*pack, *added]
            _check_together(file, subjects)
            return _write(file, subjects, bases, pack)


def remove_from_pack(path: str | Path, names: Sequence[str]) -> Path:
    """Remove subjects from a pack. Raises :class:`UserError` for an unknown name and for removing all of them."""
    file = pack_path(path)
    require_pack(file)
    with locked_folder(file.parent), Pack(file) as pack:
        for name in names:
            pack.find(name)
        rest = [subject for subject in pack if subject.name not in names]
        if not rest:
            raise UserError(f"that would leave {file} empty: delete the file instead")
        return _write(file, rest, {}, pack)


def extract_from_pack(path: str | Path, name: str, folder: str | Path, basis_dir: str | Path | None = None) -> Path:
    """Write one subject to an adapter folder, with its preview; bit for bit what was packed. Returns the file."""
    file, folder = pack_path(path), Path(folder).expanduser()
    require_vacant(folder)
    with Pack(file) as pack:
        subject = pack.find(name)
        preview = subject.preview()
        written = write_adapter(folder, read_tensors(subject.info, basis_dir), subject.info, new=True)
    write_card(folder, inspect_adapter(written))
    for ending, magic in PREVIEWS.items():
        if preview.startswith(magic):
            write_atomic(folder / f"preview{ending}", preview)
    return written


def _require_new(file: Path) -> None:
    if file.exists():
        raise UserError(f"{file} exists: add to it, or choose another name")


class Spool:
    """Bytes kept in an unnamed file, so that a pack of thousands does not have to fit in memory; a context manager.

    The file is on the disk of ``folder``, which need not exist yet, and is gone when the context ends.
    """

    def __init__(self, folder: Path) -> None:
        folder = folder.absolute()
        self._folder = next(path for path in (folder, *folder.parents) if path.is_dir())
        with user_errors(self._folder):
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def keep(self, content: bytes) -> Callable[[], bytes]:
        """Store bytes; returns a function that reads them again."""
        with user_errors(self._folder):
            start = self._file.seek(0, os.SEEK_END)
            self._file.write(content)

        def read() -> bytes:
            self._file.seek(start)
            return self._file.read(len(content))

        return read


def _read_adapters(
    adapters: Adapters, basis_dir: str | Path | None, spool: Spool
) -> tuple[list[PackedSubject], dict[str, RawTensors]]:
    """Check every adapter; return them and their bases by hash. Writes nothing but the spool."""
    if isinstance(adapters, str | Path) or not isinstance(adapters, Mapping | Sequence):
        raise UserError(f"adapters={adapters!r} has the wrong type: give a list of paths or a dict of names to paths")
    listed = adapters.items() if isinstance(adapters, Mapping) else adapters
    pairs = [entry if isinstance(entry, tuple) else ("", entry) for entry in listed]
    if not pairs:
        raise UserError("there is nothing to pack: give at least one adapter")
    bases: dict[str, RawTensors] = {}
    return [_subject(name, path, basis_dir, bases, spool) for name, path in pairs], bases


def _subject(
    name: str, path: str | Path, basis_dir: str | Path | None, bases: dict[str, RawTensors], spool: Spool
) -> PackedSubject:
    """Read and check one adapter; its basis is added to ``bases``."""
    with open_adapter(path) as adapter:
        info = adapter.info
        name = name or given_name(info.path)
        if not re.fullmatch(NAME, name):
            raise UserError(f"{name!r} is not a valid name for a subject: use letters, digits, '_' and '-'")
        if not all(axes.frozen_outer for axes in info.axes.values()):
            raise UserError(
                f"{info.path} is a {info.method} adapter without a frozen basis: a pack needs one that all subjects "
                "share"
            )
        tensors = complete(info, adapter.read(), basis_dir, bases.get(info.basis_sha256))
    _share_basis(info, frozen_factors(tensors), bases)
    tensors = {key: tensors[key] for key in sorted(tensors) if not is_frozen(key)}
    dtypes = {value.dtype for value in tensors.values()}
    if len(dtypes) != 1:
        raise UserError(f"{info.path} has more than one dtype: save it with dtype=fp32, fp16 or bf16")
    layout = Layout(dtypes.pop(), tuple((key, value.shape) for key, value in tensors.items()))
    content = save({key: value.tensor() for key, value in tensors.items()}, {"nora": dump_info(info)})
    info.sha256 = hashlib.sha256(content).hexdigest()
    preview, parameters = preview_of(info.path), b"".join(value.data for value in tensors.values())
    return PackedSubject(name, info, layout, len(preview), spool.keep(preview), spool.keep(parameters))


def _share_basis(info: AdapterInfo, basis: RawTensors, bases: dict[str, RawTensors]) -> None:
    """Add the adapter's verified basis to ``bases``; only the first is kept, since a pack has just one."""
    info.basis, info.basis_sha256 = "shared", info.basis_sha256 or raw_hash(basis)
    if not bases:
        bases[info.basis_sha256] = basis


def preview_of(path: str) -> bytes:
    """The preview image in an adapter's folder, or of a subject of another pack; empty if there is none."""
    address = split_address(path)
    if address:
        with Pack(address[0]) as pack:
            return pack.find(address[1]).preview()
    for ending, magic in PREVIEWS.items():
        image = Path(path).parent / f"preview{ending}"
        if image.is_file() and image.stat().st_size <= MAX_PREVIEW:
            content = image.read_bytes()
            return content if content.startswith(magic) else b""
    return b""


def _write(
    file: Path, subjects: Sequence[PackedSubject], bases: Mapping[str, RawTensors], old: Pack | None = None
) -> Path:
    """Write checked subjects to a pack that replaces ``old``, and their basis beside it."""
    ordered = sorted(subjects, key=lambda subject: (short_hash(subject.name.encode()), subject.name))
    common = {key: metadata_of(ordered[0].info).get(key) for key in SHARED_FIELDS}
    layouts = list(dict.fromkeys(subject.layout for subject in ordered))
    stacks = [[subject for subject in ordered if subject.layout == layout] for layout in layouts]
    cards = {subject.name: _card(subject, common) for subject in ordered}
    shared = json.dumps({"common": common, "layouts": layouts}, separators=(",", ":")).encode()
    index = b"".join(ROW.pack(*row) for row in _index_rows(ordered, stacks, cards))
    blobs = {"shared": shared, "cards": b"".join(cards.values())}
    head = {"format": "nora_pack", "pack_version": PACK_VERSION, "shared_sha256": hashlib.sha256(shared).hexdigest()}
    shapes = {"index": ("I64", [len(ordered), len(IndexRow._fields)])}
    # Wider dtypes first, so that every tensor is aligned.
    for number in sorted(range(len(layouts)), key=lambda n: -READABLE[layouts[n].dtype].itemsize):
        shapes[f"stack.{number}"] = (layouts[number].dtype, [len(stacks[number]), sum(layouts[number].sizes.values())])
    shapes |= {key: ("U8", [len(blob)]) for key, blob in blobs.items()}
    shapes["previews"] = ("U8", [sum(subject.preview_size for subject in ordered)])

    def chunks() -> Iterator[bytes]:
        yield _header(shapes, head)
        yield index
        for key in shapes:
            if key.startswith("stack."):
                yield from (subject.parameters() for subject in stacks[int(key.removeprefix("stack."))])
        yield from blobs.values()
        yield from (subject.preview() for subject in ordered)
        if old is not None:
            old.close()  # all is read, and Windows cannot replace an open file

    for basis in bases.values():
        write_basis(file.parent / BASIS_FOLDER, {key: value.tensor() for key, value in basis.items()})
    return write_atomic(file, chunks())


def _header(shapes: dict[str, tuple[str, list[int]]], head: dict[str, Any]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"nora_pack": json.dumps(head)}}
    end = 0
    for key, (dtype, shape) in shapes.items():
        start, end = end, end + math.prod(shape) * READABLE[dtype].itemsize
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return header_bytes(entries)


def _card(subject: PackedSubject, common: dict[str, Any]) -> bytes:
    """A subject's metadata as JSON, as far as it differs from ``common``; ``null`` for fields that it lacks."""
    own = metadata_of(subject.info)
    different = {key: own.get(key) for key in common | own if own.get(key) != common.get(key)}
    return json.dumps(
        {"name": subject.name, "sha256": subject.info.sha256, **different}, separators=(",", ":")
    ).encode()


def _index_rows(
    ordered: list[PackedSubject], stacks: list[list[PackedSubject]], cards: dict[str, bytes]
) -> Iterator[IndexRow]:
    rows = {subject.name: (n, row) for n, stack in enumerate(stacks) for row, subject in enumerate(stack)}
    card = preview = 0
    for subject in ordered:
        name = subject.name
        card_end, preview_end = card + len(cards[name]), preview + subject.preview_size
        check = short_hash(cards[name], subject.parameters())
        yield IndexRow(short_hash(name.encode()), *rows[name], card, card_end, preview, preview_end, check)
        card, preview = card_end, preview_end


def _check_together(file: Path, subjects: Sequence[PackedSubject]) -> None:
    """Require one basis, one base, unique names and at most :data:`MAX_LAYOUTS` layouts."""
    first, names = subjects[0], Counter(subject.name for subject in subjects)
    name, count = names.most_common(1)[0]
    if count > 1:
        raise UserError(f"{name!r} would be in {file} twice: remove it first, or give another name (NAME=PATH)")
    for subject in subjects[1:]:
        if subject.info.basis_sha256 != first.info.basis_sha256:
            raise UserError(
                f"{subject.name!r} has another basis than {first.name!r}, but a pack has just one: "
                f"train {subject.name!r} on the other's basis (basis_from), or make two packs"
            )
        ours, theirs = subject.info.fingerprints, first.info.fingerprints
        if ours.keys() != theirs.keys() or not same_weights(ours, theirs):
            raise UserError(
                f"{subject.name!r} was made for the base {subject.info.base}, {first.name!r} for {first.info.base}: "
                "their weights differ: make two packs"
            )
    if len({subject.layout for subject in subjects}) > MAX_LAYOUTS:
        raise UserError(f"the adapters have more than {MAX_LAYOUTS} different layouts: split them into several packs")
