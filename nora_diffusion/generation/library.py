"""Which adapter a name in a prompt means: one given by path, or one of a folder of adapters."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from ..errors import UserError
from ..formats.adapter_file import FILE_NAME, given_name
from ..formats.packs import SUFFIX, list_pack
from .tags import Tag, tag_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Known:
    """An adapter by the name that tags use; ``always`` is how it acts where no tag names it (None: not at all)."""

    name: str
    path: str
    always: Tag | None = None


def adapters_in(folder: str | Path) -> list[Known]:
    """The adapters of a library: ``NAME.safetensors``, ``NAME/nora_adapter.safetensors``, the subjects of packs.

    A subject is called ``PACK#NAME``, as in the app. A damaged pack is left out with a warning. Raises
    :class:`UserError` for no folder.
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise UserError(f"the library {folder} is no folder: give the one that holds your adapters")
    files = [*place.glob("*.safetensors"), *place.glob(f"*/{FILE_NAME}")]
    listed = [_listed(file) for file in sorted(files) if not file.name.startswith(".")]
    return [adapter for adapters in listed for adapter in adapters]


def _listed(file: Path) -> list[Known]:
    if not file.name.endswith(SUFFIX):
        return [Known(_name(file), str(file))]
    pack = file.name.removesuffix(SUFFIX)
    try:
        return [Known(tag_name(f"{pack}#{_name(info.path)}"), info.path) for info in list_pack(file)]
    except UserError as error:
        log.warning("%s; its subjects are left out", error)
        return []


def given(adapters: Sequence[tuple[str, float]]) -> list[Known]:
    """Adapters that act at their weight on every prompt that says nothing else. Raises for two of one name."""
    known = [Known(name := _name(path), path, Tag(name, weight, weight)) for path, weight in adapters]
    for one, two in combinations(known, 2):
        if one.name == two.name:
            raise UserError(f"{one.path} and {two.path} are both named {one.name!r}: give one of them, or rename it")
    return known


def resolve(tag: Tag, known: list[Known]) -> Known:
    """The adapter that a tag names, one given by path before those of a library, the subject of a pack last.

    Raises :class:`UserError` where there is none, or more than one.
    """
    found = [adapter for adapter in known if adapter.name == tag.name]
    found = found or [adapter for adapter in known if adapter.name.endswith(f"#{tag.name}")]
    found = [adapter for adapter in found if adapter.always] or found
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{tag} may mean {' or '.join(a.path for a in found)}: rename one")
    names = [adapter.name for adapter in known]
    near = difflib.get_close_matches(tag.name, names, 3) or names[:10]
    hint = f"there is {', '.join(near)}" if near else "give it with --adapter, or its folder with --library"
    raise UserError(f"{tag} names no adapter that is known: {hint}")


def _name(path: str | Path) -> str:
    return tag_name(given_name(path))
