"""The subjects of a server: those of the command line, and the uploaded ones."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError
from ...formats.adapter_file import FILE_NAME, inspect_adapter, locate
from ...formats.adapter_info import AdapterInfo
from ...formats.packs import SUFFIX
from ...generation.library import NamedAdapter, list_library, name_adapters, subjects_of_pack
from .answers import Refused
from .uploads import Uploads

HASH = re.compile(r"[0-9a-fA-F]{8,64}")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A subject with its description. ``uploaded``: whether it may be deleted."""

    adapter: NamedAdapter
    info: AdapterInfo
    uploaded: bool = False


class Catalog:
    """The subjects by name. ``uploads``: where uploaded ones are kept (``None``: they are refused)."""

    def __init__(self, paths: Sequence[str], uploads: Uploads | None = None) -> None:
        self.uploads = uploads
        self.subjects: dict[str, Subject] = {}
        for adapter in (own for path in paths for own in adapters_at(path)):
            self._add(adapter, False)
        for adapter in uploads.adapters() if uploads else ():
            self._add(adapter, True)

    def _add(self, adapter: NamedAdapter, uploaded: bool) -> None:
        if adapter.name in self.subjects:
            raise UserError(f"two subjects are named {adapter.name!r}: rename one of them")
        try:
            info = adapter.info or inspect_adapter(adapter.path)
            self.subjects[adapter.name] = Subject(adapter, info, uploaded)
        except UserError as error:
            log.warning("%s; the subject %s is skipped", error, adapter.name)

    def named(self, name: str) -> str:
        """The name of a subject that is named by its hash; any other name as it is.

        A hash is the SHA-256 of the file, or at least its first 8 digits. Raises :class:`UserError` if several files
        begin with it.
        """
        subjects = dict(self.subjects)
        if not HASH.fullmatch(name) or name in subjects or any(own.endswith(f"#{name}") for own in subjects):
            return name
        found = {own.info.sha256: key for key, own in subjects.items() if own.info.sha256.startswith(name.lower())}
        if len(found) > 1:
            raise UserError(f"the hash {name} may mean {' or '.join(sorted(found.values()))}: give more of its digits")
        return next(iter(found.values()), name)

    @property
    def open_uploads(self) -> Uploads:
        """Where uploads are kept. Raises :class:`Refused` if there are none."""
        if self.uploads is None:
            raise Refused(403, "this server takes no uploads: it was started without --uploads")
        return self.uploads

    @property
    def adapters(self) -> list[NamedAdapter]:
        """All of them for an engine."""
        return [subject.adapter for subject in self.subjects.values()]


def adapters_at(path: str) -> list[NamedAdapter]:
    """The adapters of a folder of adapters, of a pack, or the one of a file or its folder."""
    place = Path(path).expanduser()
    if place.is_dir() and not (place / FILE_NAME).is_file():
        found = list_library(place)
        if not found:
            raise UserError(f"the folder {path} has no adapters: give the one that holds yours")
        return found
    if place.name.endswith(SUFFIX):
        return subjects_of_pack(place)
    return [NamedAdapter(own.name, own.path) for own in name_adapters([(str(locate(path)), 1.0)])]
