"""A folder of adapters: listed from their headers alone, searched, imported into, deleted from with undo."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError
from ..formats.adapter_file import FILE_NAME, inspect_adapter
from ..formats.packs import SUFFIX, Pack
from ..generation.image_settings import read_settings
from ..io.files import make_folder, sha256, user_errors, write_atomic
from .entries import Entry, Stamp, read_entries, stamp_of
from .messages import without_folders

PICTURES, TRASH, HASHES = "pictures", ".trash", ".hashes.json"
SEARCHED_PICTURES = 500
KEPT_DELETIONS = 20
"""So many deletions can be undone; what was deleted before them is gone for good."""
SORTS = ("newest", "name", "size", "trained numbers")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
TICKET = re.compile(r"\d{1,20}-.+", re.DOTALL)


class Library:
    """The adapters of one folder: ``NAME.safetensors``, ``NAME/nora_adapter.safetensors``, the subjects of packs.

    Listing reads one header for each new or changed file and no weights; hashes are computed by :meth:`hash_all` and
    kept in a file beside the adapters.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = make_folder(folder)
        self._entries: dict[Stamp, list[Entry]] = {}
        self._hashes = self._read_hashes()
        self._lock = threading.Lock()

    @property
    def pictures(self) -> Path:
        """Where the app's pictures go."""
        return self.folder / PICTURES

    def entries(self) -> list[Entry]:
        """All adapters, newest first; an unreadable one has its fault said."""
        with self._lock:
            found = {stamp: file for file in self._files() if (stamp := stamp_of(file)) is not None}
            self._entries = {s: self._entries.get(s) or self._read(f, s) for s, f in found.items()}
            every = (entry for entries in self._entries.values() for entry in entries)
            return sorted(every, key=lambda e: (-e.stamp[1], e.name))

    def entry(self, name: str) -> Entry:
        """One adapter by name. Raises :class:`UserError` when there is none; a name is never used as a path."""
        for entry in self.entries():
            if name in (entry.name, entry.tag):
                return entry
        raise UserError(
            f"there is no adapter {name[:80]!r} in the library: remove its tag, or bring it back in the Library tab"
        )

    def find(self, text: str = "", sort: str = "newest", method: str = "all") -> list[Entry]:
        """Entries that match all words of ``text``, in the order ``sort``."""
        if sort not in SORTS:
            raise UserError(f"sort={sort!r} is unknown: choose one of {', '.join(SORTS)}")
        words = text.lower().split()
        found = [e for e in self.entries() if e.matches(words)]
        if method != "all":
            found = [e for e in found if e.info and e.info.method == method]
        keys = {
            "name": lambda e: e.name.lower(),
            "size": lambda e: e.size,
            "trained numbers": lambda e: e.info.trained_parameters if e.info else 0,
        }
        return sorted(found, key=keys[sort]) if sort in keys else found

    def by_hash(self, digest: str) -> Entry | None:
        """The adapter whose file has this full SHA-256."""
        entries = self.entries()
        self.hash_all(entries)
        return next((e for e in entries if len(digest) == 64 and e.sha256 == digest), None)

    def pictures_with(self, entry: Entry, most: int = 12) -> list[Path]:
        """The newest generated pictures whose settings name this adapter by its full hash."""
        self.hash_all([entry])
        found: list[Path] = []
        for file in sorted(self.pictures.glob("*.png"), key=lambda f: -f.stat().st_mtime)[:SEARCHED_PICTURES]:
            with contextlib.suppress(UserError, OSError):
                if any(adapter.get("sha256") == entry.sha256 for adapter in read_settings(file).adapters):
                    found.append(file)
            if len(found) == most:
                break
        return found

    def hash_all(self, entries: Iterable[Entry] | None = None) -> None:
        """Hash what has no hash yet, and keep the result."""
        missing = [e for e in (self.entries() if entries is None else entries) if not e.sha256]
        for entry in missing:
            try:
                entry.sha256 = sha256(entry.file)
            except OSError:
                continue  # gone meanwhile
            self._hashes[_key(entry.stamp)] = entry.sha256
        if missing:
            known = {_key(stamp) for stamp in self._entries}
            self._hashes = {k: v for k, v in self._hashes.items() if k in known}
            write_atomic(self.folder / HASHES, json.dumps(self._hashes))

    def add(self, source: Path, name: str) -> Entry:
        """Copy an adapter file into the library under a free name, after a look at its header.

        Raises :class:`UserError` for anything but a sound adapter file.
        """
        if source.suffix.lower() != ".safetensors":
            raise UserError(f"{Path(name).name} is not a safetensors file: other formats may run code and are not read")
        if Path(name).name.endswith(SUFFIX):
            return self._add_pack(source, Path(name).name.removesuffix(SUFFIX))
        info = inspect_adapter(source)
        twin = self.by_hash(info.sha256)
        if twin is not None:
            raise UserError(f"this adapter is in the library already, as {twin.name!r}")
        target = self.free_folder(safe_name(Path(name).stem if Path(name).name != FILE_NAME else info.trigger))
        # A file of another tool is no nora_adapter.safetensors: it keeps its form and lies by itself.
        file = target / FILE_NAME if info.kind == "nora" else target.with_suffix(".safetensors")
        write_atomic(file, source.read_bytes())
        return self.entry(target.name)

    def _add_pack(self, source: Path, name: str) -> Entry:
        with Pack(source) as pack:
            if not list(pack):  # reads every card, so that a damaged one is refused here
                raise UserError(f"the pack {source.name} holds no subject")
        file = self.folder / f"{self.free_folder(safe_name(name)).name}{SUFFIX}"
        write_atomic(file, source.read_bytes())
        return next(entry for entry in self.entries() if entry.pack == file)

    def delete(self, name: str) -> str:
        """Move an adapter into the library's bin; returns the ticket with which :meth:`restore` brings it back."""
        entry = self.entry(name)
        if entry.pack is not None:
            raise UserError(
                f"{entry.name!r} is one subject of the pack {entry.pack.name}: nora-diffusion pack remove takes it out"
            )
        ticket = f"{time.time_ns()}-{entry.name}"
        place = make_folder(self.folder / TRASH / ticket)
        source = entry.file.parent if entry.in_own_folder else entry.file
        with user_errors(source):
            shutil.move(str(source), place / source.name)
        for old in self.deletions()[KEPT_DELETIONS:]:
            shutil.rmtree(self.folder / TRASH / old, ignore_errors=True)
        return ticket

    def deletions(self) -> list[str]:
        """The tickets of the deletions that can be undone, newest first."""
        places = [p for p in (self.folder / TRASH).glob("*-*") if TICKET.fullmatch(p.name) and any(p.iterdir())]
        return sorted((p.name for p in places), key=lambda name: -int(name.partition("-")[0]))

    def restore(self, ticket: str) -> Entry:
        """Undo a deletion, under a free name where something else has taken its own."""
        known = {name: self.folder / TRASH / name for name in self.deletions()}
        if ticket not in known:
            raise UserError("there is nothing to bring back")
        (source,) = known[ticket].iterdir()
        target = self.folder / source.name
        if target.exists():  # a refusal would keep all deletions before this one from being undone
            bare = _bare(target)
            target = self.folder / f"{self.free_folder(bare).name}{source.name.removeprefix(bare)}"
        with user_errors(target):
            source.rename(target)
            known[ticket].rmdir()
        return self.entry(target.name if target.is_dir() else _bare(target))

    def _files(self) -> Iterable[Path]:
        for place in self.folder.iterdir():
            if place.name.startswith(".") or place.is_symlink():
                continue
            if place.suffix == ".safetensors" and place.is_file():
                yield place
            elif (file := place / FILE_NAME).is_file() and not file.is_symlink():
                yield file

    def _read(self, file: Path, stamp: Stamp) -> list[Entry]:
        entries = read_entries(file, stamp)
        for entry in entries:
            entry.sha256 = entry.sha256 or self._hashes.get(_key(stamp), "")
            entry.fault = without_folders(entry.fault.replace(f"{self.folder}/", ""))
        return entries

    def free_folder(self, name: str) -> Path:
        """A place for a new adapter, with a number behind its name where that is taken."""
        taken = {entry.name for entry in self.entries()} | {_bare(place) for place in self.folder.iterdir()}
        names = (name if n == 1 else f"{name}-{n}" for n in range(1, 10_000))
        return self.folder / next(n for n in names if n not in taken)

    def _read_hashes(self) -> dict[str, str]:
        try:
            values = json.loads((self.folder / HASHES).read_text(encoding="utf-8"))
            return {str(k): str(v) for k, v in values.items()}
        except (OSError, ValueError, AttributeError):
            return {}  # only a cache


def safe_name(text: str) -> str:
    """A name for a folder, a tag and PEFT from any text."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-_")[:64].strip("-_")
    return name if NAME.fullmatch(name) else "adapter"


def _bare(place: Path) -> str:
    return place.name.removesuffix(SUFFIX).removesuffix(".safetensors")


def _key(stamp: Stamp) -> str:
    return f"{stamp[0]}|{stamp[1]}|{stamp[2]}"
