"""The entries of the library: each is one adapter, in a file, a folder, or a pack."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..errors import UserError, printable
from ..formats.adapter_file import FILE_NAME, basis_files, given_name, inspect_adapter, split_address
from ..formats.adapter_info import AdapterInfo
from ..formats.packs import SUFFIX, Pack, PackedSubject
from ..generation.tags import tag_name
from ..io.files import write_atomic
from ..io.run_layout import SAMPLES
from ..io.untrusted import conform

THUMBNAIL, SCORES = "thumbnail.png", "scores.json"
MAX_SCORES = 2**16

Stamp = tuple[str, int, int]
"""Path, modification time in ns, and size of a file: changes when the file is rewritten."""


@dataclass
class Entry:
    """One adapter of the library. ``name`` is unique in it; ``info`` is None if the file is unreadable.

    ``file`` is what ``load_adapter`` takes: a path, or the address ``PACK#NAME`` of a subject in a pack, which is named
    ``pack#name`` here. ``error`` says why no base can use the adapter.
    """

    name: str
    file: Path
    stamp: Stamp
    info: AdapterInfo | None = None
    error: str = ""
    sha256: str = ""
    untold: ClassVar[frozenset[str]] = frozenset()
    """What is not known about it, as the page names it."""

    @property
    def modified(self) -> float:
        """Modification time of the file, in seconds since the epoch."""
        return self.stamp[1] / 1e9

    @property
    def size(self) -> int:
        """Size in bytes; for a subject of a pack, its share of the pack."""
        return self.info.bytes if self.pack and self.info else self.stamp[2]

    @property
    def tag(self) -> str:
        """The adapter's name in a ``<lora:name:weight>`` tag."""
        return tag_name(self.name)

    @property
    def pack(self) -> Path | None:
        """The pack that contains the adapter, or None."""
        address = split_address(self.file)
        return address[0] if address else None

    @property
    def in_own_folder(self) -> bool:
        """Whether the adapter has a folder of its own (as the trainer writes it), and is not a single file."""
        return self.file.name == FILE_NAME

    def matches(self, words: Iterable[str]) -> bool:
        """Whether each word occurs in the name, the hash or the metadata."""
        info = self.info
        metadata = (info.trigger, info.class_word, info.instance_prompt, info.method, info.base) if info else ()
        text = " ".join((self.name, self.sha256, *metadata)).lower()
        return all(word in text for word in words)

    def scores(self) -> dict[str, float]:
        """Scores of the training's last samples by name, each from 0 to 1."""
        stored = self.info.extra.get("scores") if self.info else None
        file = self.file.parent / SCORES
        if stored is None and self.in_own_folder and file.is_file() and file.stat().st_size <= MAX_SCORES:
            try:
                stored = json.loads(file.read_bytes())
            except (OSError, ValueError, RecursionError):
                return {}
        found = {}
        for name, value in stored.items() if isinstance(stored, dict) else ():
            with contextlib.suppress(ValueError):
                found[printable(name)[:40]] = float(conform(value, float, name, 1))
        return found

    def thumbnail(self) -> Path | bytes | None:
        """The chosen thumbnail, else the pack's preview or the last sample of the training, else None."""
        address = split_address(self.file)
        if address:
            with Pack(address[0]) as pack:
                return pack.find(address[1]).preview() or None
        chosen = self._own_thumbnail()
        if chosen.is_file():
            return chosen
        samples = (self.file.parent / SAMPLES).glob("**/*.png") if self.in_own_folder else ()
        return max(samples, key=lambda f: f.stat().st_mtime, default=None)

    def choose_thumbnail(self, image: Path) -> None:
        """Use this image as the thumbnail. Raises :class:`UserError` for a subject of a pack."""
        if self.pack:
            raise UserError(f"{self.name!r} is in a pack, so its thumbnail is the one in the pack")
        write_atomic(self._own_thumbnail(), image.read_bytes())

    def _own_thumbnail(self) -> Path:
        return self.file.parent / THUMBNAIL if self.in_own_folder else self.file.with_suffix(".png")


def name_of(path: Path) -> str:
    """The name that a file or folder of the library takes: no two adapters may share it.

    Characters that a page cannot show, as in a name that is not UTF-8, are escaped.
    """
    return printable(path.name.removesuffix(SUFFIX).removesuffix(".safetensors"))


def read_entries(file: Path, stamp: Stamp) -> list[Entry]:
    """Read one file of the library: an adapter, or the subjects of a pack. Errors are stored in the entry."""
    if file.name.endswith(SUFFIX):
        return _read_pack(file, stamp)
    entry = Entry(printable(given_name(file)), file, stamp)
    try:
        entry.info = inspect_adapter(file, hashed=False)
    except (UserError, OSError) as error:
        entry.error = str(error)
    else:
        entry.error = _missing_basis(entry.info, file)
    return [entry]


def _read_pack(file: Path, stamp: Stamp) -> list[Entry]:
    try:
        with Pack(file) as pack:
            return [_packed_entry(file, stamp, subject) for subject in pack]
    except (UserError, OSError) as error:
        return [Entry(name_of(file), file, stamp, error=str(error))]


def _packed_entry(pack: Path, stamp: Stamp, subject: PackedSubject) -> Entry:
    name, info = f"{name_of(pack)}#{subject.name}", subject.info
    return Entry(name, Path(info.path), stamp, info, _missing_basis(info, pack), info.sha256)


def _missing_basis(info: AdapterInfo, file: Path) -> str:
    """An error if the adapter's shared basis file is missing, else an empty string."""
    if info.basis == "shared":
        try:
            basis_files(info)
        except UserError:
            return f"its shared basis is missing: put bases/{info.basis_sha256[:12]}….safetensors next to {file.name}"
    return ""


def stamp_of(path: Path) -> Stamp | None:
    """The stamp of an adapter's file, or of the pack that contains it; None if the file is gone."""
    address = split_address(path)
    try:
        status = (address[0] if address else path).stat()
    except OSError:
        return None
    return str(path), status.st_mtime_ns, status.st_size
