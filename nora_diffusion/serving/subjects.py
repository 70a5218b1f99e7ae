"""The subjects that requests may name, which change while an engine runs."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..formats.adapter_file import locate, split_address
from ..generation.library import NamedAdapter, find_adapter
from ..generation.tags import Tag


@dataclass(frozen=True)
class Source:
    """The content of an adapter's file: its path, and what tells this content from later ones."""

    path: str
    version: tuple[int, int, int]


def source_of(path: str) -> Source:
    """The present content at an adapter's path or address in a pack. Raises :class:`UserError` if there is none."""
    address = split_address(path)
    file = address[0] if address else locate(path)
    try:
        state = Path(file).stat()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): put it back, or remove the subject") from None
    return Source(path, (state.st_mtime_ns, state.st_size, state.st_ino))


class Subjects:
    """The subjects, which any thread may change. ``paths``: those of all of them."""

    def __init__(self, subjects: Iterable[NamedAdapter] = ()) -> None:
        self._lock = threading.Lock()
        self._set(list(subjects))

    def _set(self, subjects: list[NamedAdapter]) -> None:
        """Replace the tables; a reader, who takes no lock, has the old or the new ones."""
        by_name: dict[str, list[NamedAdapter]] = {}
        for subject in subjects:
            by_name.setdefault(subject.name, []).append(subject)
        self._all, self._by_name = subjects, by_name
        self.paths = frozenset(subject.path for subject in subjects)

    def find(self, tag: Tag) -> NamedAdapter:
        """The subject that a tag names. Raises :class:`UserError` if there is none."""
        return find_adapter(tag, self._by_name.get(tag.name) or self._all)

    def add(self, subject: NamedAdapter) -> None:
        """Add a subject. Raises :class:`UserError` if its name is taken."""
        with self._lock:
            if subject.name in self._by_name:
                raise UserError(f"there is a subject {subject.name!r} already: choose another name")
            self._set([*self._all, subject])

    def remove(self, name: str) -> None:
        """Remove a subject. Raises :class:`UserError` if there is none of this name."""
        with self._lock:
            left = [own for own in self._all if own.name != name]
            if len(left) == len(self._all):
                raise UserError(f"there is no subject {name[:80]!r}")
            self._set(left)
