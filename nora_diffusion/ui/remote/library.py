"""The subjects of a server as the app's library. Its folder on this machine holds the generated images only."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import UserError
from ...formats.adapter_info import AdapterInfo
from ...generation.tags import FORBIDDEN
from ...serving.client import Subject
from ..backend import ELSEWHERE
from ..entries import Entry
from ..library import Library
from .server import Server


@dataclass
class RemoteInfo(AdapterInfo):
    """What a server says about an adapter."""

    described: Subject = field(default_factory=lambda: Subject(""))

    @property
    def method(self) -> str:
        """The preset's name."""
        return self.described.method

    @property
    def ranks(self) -> str:
        """The ranks as text."""
        return self.described.ranks


class RemoteEntry(Entry):
    """A subject of a server. It has no file here, so that its name is never used as a path."""

    untold = frozenset({"file", "base", "components", "modified"})

    @property
    def size(self) -> int:
        """Size in bytes on the server."""
        return self.info.bytes if self.info else 0

    @property
    def pack(self) -> Path | None:
        """None: a server names the subjects of packs one by one."""
        return None

    def scores(self) -> dict[str, float]:
        """None are told."""
        return {}

    def thumbnail(self) -> Path | bytes | None:
        """None is told."""
        return None

    def choose_thumbnail(self, image: Path) -> None:
        """Raises :class:`UserError`."""
        raise UserError(ELSEWHERE)


class RemoteLibrary(Library):
    """The subjects of a server, in its order. Changes are refused."""

    def __init__(self, folder: Path, server: Server) -> None:
        super().__init__(folder)
        self.server = server

    def entries(self) -> list[Entry]:
        """The subjects that the server named last. Those whose names no tag can have are left out."""
        return [entry_of(own) for own in self.server.subjects if own.name and not FORBIDDEN.search(own.name)]

    def entry(self, name: str) -> Entry:
        """One subject by name. Raises :class:`UserError` if there is none."""
        found = next((entry for entry in self.entries() if entry.name == name), None)
        if found is None:
            raise UserError(f"the server has no subject {name[:80]!r}: remove its tag, or choose another one")
        return found

    def hash_all(self, entries: Iterable[Entry] | None = None) -> None:
        """Nothing: the server tells the hashes."""

    def add(self, source: Path, name: str) -> Entry:
        """Raises :class:`UserError`."""
        raise UserError(ELSEWHERE)

    def delete(self, name: str) -> str:
        """Raises :class:`UserError`."""
        raise UserError(ELSEWHERE)

    def deletions(self) -> list[str]:
        """None: nothing is deleted here."""
        return []

    def restore(self, trash_id: str) -> Entry:
        """Raises :class:`UserError`."""
        raise UserError(ELSEWHERE)

    def reserved(self, name: str) -> AbstractContextManager[Path]:
        """Raises :class:`UserError`."""
        raise UserError(ELSEWHERE)


def entry_of(subject: Subject) -> Entry:
    """A subject as an entry of the library."""
    info = RemoteInfo(
        {}, trigger=subject.trigger, class_word=subject.class_word, instance_prompt=subject.instance_prompt,
        sha256=subject.sha256, bytes=subject.bytes, trained_parameters=subject.parameters, described=subject,
    )  # fmt: skip
    stamp = (subject.name, 0, subject.bytes)
    return RemoteEntry(subject.name, Path(subject.name), stamp, info, sha256=subject.sha256)
