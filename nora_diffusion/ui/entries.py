"""What the library knows of one adapter: a file, a folder, or one subject of a pack."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..formats.adapter_file import FILE_NAME, AdapterInfo, basis_files, given_name, inspect_adapter, split_address
from ..formats.packs import SUFFIX, Pack, PackedSubject
from ..generation.tags import tag_name
from ..io.files import write_atomic
from ..io.run_layout import SAMPLES

THUMBNAIL, SCORES = "thumbnail.png", "scores.json"
MAX_SCORES = 2**16

Stamp = tuple[str, int, int]


@dataclass
class Entry:
    """One adapter of the library: ``name`` is unique in it; ``info`` is None where the file is unreadable.

    ``file`` is what ``load_adapter`` takes: a path, or the address ``PACK#NAME`` of a subject in a pack, which is named
    ``pack#name`` here. ``fault`` says why it cannot be used with any base.
    """

    name: str
    file: Path
    stamp: Stamp
    info: AdapterInfo | None = None
    fault: str = ""
    sha256: str = ""

    @property
    def modified(self) -> float:
        """When the file was written, in seconds since the epoch."""
        return self.stamp[1] / 1e9

    @property
    def size(self) -> int:
        """Bytes of the adapter, within its pack where it is in one."""
        return self.info.bytes if self.pack and self.info else self.stamp[2]

    @property
    def tag(self) -> str:
        """The name by which a prompt may call it."""
        return tag_name(self.name)

    @property
    def pack(self) -> Path | None:
        """The pack that it is in."""
        address = split_address(self.file)
        return address[0] if address else None

    @property
    def in_own_folder(self) -> bool:
        """Whether the adapter is a folder of its own (what the trainer writes), and not a single file."""
        return self.file.name == FILE_NAME

    def matches(self, words: Iterable[str]) -> bool:
        """Whether each word is in the name or in what the file says of itself."""
        info = self.info
        said = (info.trigger, info.class_word, info.instance_prompt, info.method, info.base) if info else ()
        text = " ".join((self.name, self.sha256, *said)).lower()
        return all(word in text for word in words)

    def scores(self) -> dict[str, float]:
        """How true its pictures are, as its training found: numbers from 0 to 1 by name."""
        stored = self.info.extra.get("scores") if self.info else None
        file = self.file.parent / SCORES
        if stored is None and self.in_own_folder and file.is_file() and file.stat().st_size <= MAX_SCORES:
            try:
                stored = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                return {}
        if not isinstance(stored, dict):
            return {}
        numbers = {str(k)[:40]: v for k, v in stored.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}

    def thumbnail(self) -> Path | bytes | None:
        """A picture of the subject: the chosen one, else a pack's preview or the last sample of its training."""
        address = split_address(self.file)
        if address:
            with Pack(address[0]) as pack:
                return pack.find(address[1]).preview() or None
        chosen = self._own_thumbnail()
        if chosen.is_file():
            return chosen
        samples = (self.file.parent / SAMPLES).glob("**/*.png") if self.in_own_folder else ()
        return max(samples, key=lambda f: f.stat().st_mtime, default=None)

    def choose_thumbnail(self, picture: Path) -> None:
        """Show this picture from now on. Raises :class:`UserError` for a subject of a pack, which has its own."""
        if self.pack:
            raise UserError(f"{self.name!r} is in a pack, which brings its own picture")
        write_atomic(self._own_thumbnail(), picture.read_bytes())

    def _own_thumbnail(self) -> Path:
        return self.file.parent / THUMBNAIL if self.in_own_folder else self.file.with_suffix(".png")


def read_entries(file: Path, stamp: Stamp) -> list[Entry]:
    """What one file of the library holds: one adapter, or the subjects of a pack; a fault where it cannot be used."""
    if file.name.endswith(SUFFIX):
        return _read_pack(file, stamp)
    entry = Entry(given_name(file), file, stamp)
    try:
        entry.info = inspect_adapter(file, hashed=False)
    except (UserError, OSError) as error:
        entry.fault = str(error)
    else:
        entry.fault = _lacks_basis(entry.info, file)
    return [entry]


def _read_pack(file: Path, stamp: Stamp) -> list[Entry]:
    try:
        with Pack(file) as pack:
            return [_subject(file, stamp, subject) for subject in pack]
    except (UserError, OSError) as error:
        return [Entry(file.name.removesuffix(SUFFIX), file, stamp, fault=str(error))]


def _subject(pack: Path, stamp: Stamp, subject: PackedSubject) -> Entry:
    name, info = f"{pack.name.removesuffix(SUFFIX)}#{subject.name}", subject.info
    return Entry(name, Path(info.path), stamp, info, _lacks_basis(info, pack), info.sha256)


def _lacks_basis(info: AdapterInfo, file: Path) -> str:
    """A shared basis lies beside the adapters that use it; without it their numbers mean nothing."""
    if info.basis == "shared":
        try:
            basis_files(info)
        except UserError:
            return f"its shared basis is missing: put bases/{info.basis_sha256[:12]}….safetensors beside {file.name}"
    return ""


def stamp_of(path: Path) -> Stamp | None:
    """What changes when the file of an adapter, or the pack that it is in, is written anew."""
    address = split_address(path)
    try:
        status = (address[0] if address else path).stat()
    except OSError:
        return None
    return str(path), status.st_mtime_ns, status.st_size
