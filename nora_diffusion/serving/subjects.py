"""The subjects that requests may name, which change while an engine runs."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..formats.adapter_file import locate, split_address
from ..generation.library import NamedAdapter, find_adapter
from ..generation.tags import Tag
from .request import Request


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

    def sources(self, request: Request) -> tuple[Source, ...]:
        """The contents that a request names. Raises :class:`UserError` for an unknown one and for one given twice."""
        paths = [request.adapters.get(tag.name) or self.find(tag).path for tag in request.tags]
        if len(set(paths)) < len(paths):
            raise UserError("two subjects of the request are the same adapter: give it once")
        return tuple(source_of(path) for path in paths)

    def check_there(self, request: Request, sources: Sequence[Source]) -> None:
        """Raises :class:`UserError` if one of a request's subjects has been removed since it was sent."""
        if sources and {source.path for source in sources} - set(request.adapters.values()) - self.paths:
            raise UserError("a subject of the request was removed while it waited: send it without that subject")

    def add(self, subject: NamedAdapter) -> None:
        """Add a subject. Raises :class:`UserError` if its name is taken."""
        with self._lock:
            if subject.name in self._by_name:
                raise UserError(f"there is a subject {subject.name!r} already: choose another name")
            self._set([*self._all, subject])

    def remove(self, name: str) -> list[NamedAdapter]:
        """Remove a subject, which is returned. Raises :class:`UserError` if there is none of this name."""
        with self._lock:
            removed = self._by_name.get(name, [])
            if not removed:
                raise UserError(f"there is no subject {name[:80]!r}")
            self._set([own for own in self._all if own.name != name])
            return removed
