"""A folder of adapters: listed from their headers, searched, imported into, deleted from with undo."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from ..errors import UserError
from ..formats.adapter_file import FILE_NAME, inspect_adapter, verify_adapter
from ..formats.packs import SUFFIX, Pack
from ..generation.image_settings import read_settings
from ..io.files import make_folder, reserved_name, sha256, user_errors, write_atomic
from .entries import Entry, Stamp, name_of, read_entries, stamp_of
from .messages import without_folders

IMAGES, TRASH, HASHES = "pictures", ".trash", ".hashes.json"
MAX_SEARCHED_IMAGES = 500
MAX_DELETIONS = 20
"""Number of deletions that can be undone; older ones are removed from the disk."""
SORTS = ("newest", "name", "size", "parameters")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
TRASH_ID = re.compile(r"\d{1,20}-.+", re.DOTALL)


class Library:
    """The adapters of one folder: ``NAME.safetensors``, ``NAME/nora_adapter.safetensors``, the subjects of packs.

    Listing reads one header per new or changed file and no weights. :meth:`hash_all` computes hashes and caches them in
    a file of the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = make_folder(folder)
        self._entries: dict[Stamp, list[Entry]] = {}
        self._hashes = self._read_hashes()
        self._lock = threading.Lock()

    @property
    def images(self) -> Path:
        """The folder of generated images."""
        return self.folder / IMAGES

    def entries(self) -> list[Entry]:
        """All adapters, newest first. An unreadable one has its ``error`` set."""
        with self._lock:
            found = {stamp: file for file in self._files() if (stamp := stamp_of(file)) is not None}
            self._entries = {s: self._entries.get(s) or self._read(f, s) for s, f in found.items()}
            every = (entry for entries in self._entries.values() for entry in entries)
            return sorted(every, key=lambda e: (-e.stamp[1], e.name))

    def entry(self, name: str) -> Entry:
        """One adapter by name. Raises :class:`UserError` if there is none. The name is never used as a path."""
        for entry in self.entries():
            if name in (entry.name, entry.tag):
                return entry
        raise UserError(
            f"there is no adapter {name[:80]!r} in the library: remove its tag, or restore it in the Library tab"
        )

    def find(self, text: str = "", sort: str = "newest", method: str = "all") -> list[Entry]:
        """Entries that match all words of ``text``, sorted by ``sort``."""
        if sort not in SORTS:
            raise UserError(f"sort={sort!r} is unknown: choose one of {', '.join(SORTS)}")
        words = text.lower().split()
        found = [e for e in self.entries() if e.matches(words)]
        if method != "all":
            found = [e for e in found if e.info and e.info.method == method]
        keys = {
            "name": lambda e: e.name.lower(),
            "size": lambda e: e.size,
            "parameters": lambda e: e.info.trained_parameters if e.info else 0,
        }
        return sorted(found, key=keys[sort]) if sort in keys else found

    def by_hash(self, digest: str) -> Entry | None:
        """The adapter whose file has this full SHA-256."""
        entries = self.entries()
        self.hash_all(entries)
        return next((e for e in entries if len(digest) == 64 and e.sha256 == digest), None)

    def images_with(self, entry: Entry, most: int = 12) -> list[Path]:
        """The newest generated images whose settings contain this adapter's full hash."""
        self.hash_all([entry])
        found: list[Path] = []
        for file in sorted(self.images.glob("*.png"), key=lambda f: -f.stat().st_mtime)[:MAX_SEARCHED_IMAGES]:
            with contextlib.suppress(UserError, OSError):
                if any(adapter.get("sha256") == entry.sha256 for adapter in read_settings(file).adapters):
                    found.append(file)
            if len(found) == most:
                break
        return found

    def hash_all(self, entries: Iterable[Entry] | None = None) -> None:
        """Compute missing hashes and cache them."""
        missing = [e for e in (self.entries() if entries is None else entries) if not e.sha256]
        for entry in missing:
            try:
                entry.sha256 = sha256(entry.file)
            except OSError:
                continue  # deleted in the meantime
            self._hashes[_key(entry.stamp)] = entry.sha256
        if missing:
            known = {_key(stamp) for stamp in self._entries}
            self._hashes = {k: v for k, v in self._hashes.items() if k in known}
            with contextlib.suppress(UserError):  # only a cache: the folder may be read-only
                write_atomic(self.folder / HASHES, json.dumps(self._hashes))

    def add(self, source: Path, name: str) -> Entry:
        """Copy an adapter file into the library under an unused name, after its header and its tensors were checked.

        Raises :class:`UserError` for anything but a valid adapter file.
        """
        if source.suffix.lower() != ".safetensors":
            raise UserError(
                f"{Path(name).name} is not a safetensors file: other formats are refused because they may run code"
            )
        if Path(name).name.endswith(SUFFIX):
            return self._add_pack(source, Path(name).name.removesuffix(SUFFIX))
        info = inspect_adapter(source)
        if info.basis == "own":  # a shared basis need not be beside the file yet
            verify_adapter(info)
        duplicate = self.by_hash(info.sha256)
        if duplicate is not None:
            raise UserError(f"this adapter is already in the library, as {duplicate.name!r}")
        with self.reserved(Path(name).stem if Path(name).name != FILE_NAME else info.trigger) as folder:
            # Another tool's file is not a nora_adapter.safetensors: it stays a single file.
            file = folder / FILE_NAME if info.is_ours else folder.with_suffix(".safetensors")
            write_atomic(file, source.read_bytes(), new=True)
        return self.entry(folder.name)

    def _add_pack(self, source: Path, name: str) -> Entry:
        with Pack(source) as pack:
            if not list(pack):  # reads the metadata of every subject, so a damaged pack is refused here
                raise UserError(f"the pack {source.name} contains no subject")
        with self.reserved(name) as folder:
            file = write_atomic(folder.with_suffix(SUFFIX), source.read_bytes(), new=True)
        return next(entry for entry in self.entries() if entry.pack == file)

    def delete(self, name: str) -> str:
        """Move an adapter to the trash folder. Returns the id that :meth:`restore` takes."""
        entry = self.entry(name)
        if entry.pack is not None:
            raise UserError(
                f"{entry.name!r} is part of the pack {entry.pack.name}: remove it with nora-diffusion pack remove"
            )
        trash_id = f"{time.time_ns()}-{entry.name}"
        folder = self.folder / TRASH / trash_id
        source = entry.file.parent if entry.in_own_folder else entry.file
        with user_errors(source):
            folder.mkdir(parents=True)
            try:
                source.rename(folder / source.name)
            except OSError:
                folder.rmdir()
                raise
        for old in self.deletions()[MAX_DELETIONS:]:
            shutil.rmtree(self.folder / TRASH / old, ignore_errors=True)
        return trash_id

    def deletions(self) -> list[str]:
        """Ids of the deletions that can be undone, newest first."""
        return list(self._deleted())

    def _deleted(self) -> dict[str, Path]:
        """What each deletion that can be undone has moved, newest first."""
        tickets = [path for path in (self.folder / TRASH).glob("*-*") if TRASH_ID.fullmatch(path.name)]
        tickets.sort(key=lambda path: -int(path.name.partition("-")[0]))
        return {path.name: moved for path in tickets if (moved := _moved(path)) is not None}

    def restore(self, trash_id: str) -> Entry:
        """Undo a deletion. The adapter gets an unused name if its own is taken by now."""
        source = self._deleted().get(trash_id)
        if source is None:
            raise UserError("there is nothing to restore")
        ending = next((end for end in (SUFFIX, ".safetensors") if source.name.endswith(end)), "")
        name = source.name.removesuffix(ending)
        with reserved_name(self.folder, name, name_of) as folder, user_errors(source):
            if source.is_dir():
                if os.name == "nt":  # where a folder cannot replace an empty one
                    folder.rmdir()
                source.rename(folder)
            else:
                source.rename(folder.with_name(folder.name + ending))
        shutil.rmtree(source.parent, ignore_errors=True)
        return self.entry(name_of(folder))

    def _files(self) -> Iterable[Path]:
        for path in self.folder.iterdir():
            file = path if path.suffix == ".safetensors" else path / FILE_NAME
            with contextlib.suppress(OSError):  # a folder that may not be entered
                if not (path.name.startswith(".") or path.is_symlink() or file.is_symlink()) and file.is_file():
                    yield file

    def _read(self, file: Path, stamp: Stamp) -> list[Entry]:
        entries = read_entries(file, stamp)
        for entry in entries:
            entry.sha256 = entry.sha256 or self._hashes.get(_key(stamp), "")
            entry.error = without_folders(entry.error.replace(f"{self.folder}/", ""))
        return entries

    def reserved(self, name: str) -> AbstractContextManager[Path]:
        """Reserve a name for a new adapter: ``name`` made safe, or with ``-2``, ``-3`` ... if that is taken.

        Yields the adapter's folder, which is removed at the end if it is empty.
        """
        return reserved_name(self.folder, safe_name(name), name_of)

    def _read_hashes(self) -> dict[str, str]:
        try:
            values = json.loads((self.folder / HASHES).read_text(encoding="utf-8"))
            return {str(k): str(v) for k, v in values.items()}
        except (OSError, ValueError, AttributeError):
            return {}  # only a cache


def safe_name(text: str) -> str:
    """Turn any text into a name that is valid for a folder, a tag and PEFT."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-_")[:64].strip("-_")
    return name if NAME.fullmatch(name) else "adapter"


def _moved(ticket: Path) -> Path | None:
    """The adapter in a folder of the trash; None for an empty or unreadable folder. Other files do not count."""
    try:
        adapters = [p for p in ticket.iterdir() if (p / FILE_NAME).is_file() or p.suffix == ".safetensors"]
    except OSError:
        return None
    return adapters[0] if len(adapters) == 1 else None


def _key(stamp: Stamp) -> str:
    return f"{stamp[0]}|{stamp[1]}|{stamp[2]}"
