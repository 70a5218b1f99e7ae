"""Which subjects are loaded: those in use, and the most recently used of the others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from ..errors import UserError
from ..formats.adapter_info import AdapterInfo
from ..loaders import delete_adapter, load_adapter


@dataclass(frozen=True)
class Resident:
    """A loaded subject. ``adapter``: its name in the pipeline."""

    adapter: str
    info: AdapterInfo


@dataclass
class Residents:
    """The loaded subjects of a pipeline by path, the least recently used first; at most ``most`` of them."""

    pipe: Any
    most: int
    loads: int = 0
    _loaded: OrderedDict[str, Resident] = field(default_factory=OrderedDict)
    _numbers: Iterable[int] = field(default_factory=count)

    def missing(self, paths: Iterable[str]) -> list[str]:
        """Those of these subjects that are not loaded."""
        return [path for path in dict.fromkeys(paths) if path not in self._loaded]

    def get(self, path: str) -> Resident:
        """A loaded subject, which is the most recently used one now."""
        self._loaded.move_to_end(path)
        return self._loaded[path]

    def load(self, path: str, in_use: Collection[str]) -> None:
        """Load a subject, in place of the least recently used one that is not in use if there are ``most``.

        Raises :class:`UserError` for a file that cannot be loaded.
        """
        while len(self._loaded) >= self.most:
            oldest = next((own for own in self._loaded if own not in in_use), None)
            if oldest is None:
                raise UserError(f"all {self.most} loaded subjects are in use: allow more, or send fewer at once")
            self.remove(oldest)
        name = f"subject_{next(iter(self._numbers))}"
        self._loaded[path] = Resident(name, load_adapter(self.pipe, path, name, activate=False).info)
        self.loads += 1

    def remove(self, path: str) -> None:
        """Unload a subject; nothing of it stays in the pipeline."""
        if resident := self._loaded.pop(path, None):
            delete_adapter(self.pipe, resident.adapter)

    @property
    def loaded(self) -> Mapping[str, Resident]:
        """The loaded subjects by path."""
        return self._loaded
