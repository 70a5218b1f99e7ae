"""Find the adapter that a tag in a prompt names: one given by path, or one of a folder of adapters."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from ..errors import UserError
from ..formats.adapter_file import FILE_NAME, given_name
from ..formats.adapter_info import AdapterInfo
from ..formats.packs import SUFFIX, list_pack
from .tags import Tag, tag_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter, by the name that tags use.

    ``default``: its weights in prompts that do not name it (``None``: inactive there). ``info``: its description, if
    that has been read already.
    """

    name: str
    path: str
    default: Tag | None = None
    info: AdapterInfo | None = field(default=None, compare=False, repr=False)


def list_library(folder: str | Path) -> list[NamedAdapter]:
    """The adapters of a library: ``NAME.safetensors``, ``NAME/nora_adapter.safetensors``, the subjects of packs.

    A subject of a pack is named ``PACK#NAME``, as in the app. A damaged pack is skipped with a warning. Raises
    :class:`UserError` if ``folder`` is not a folder.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"the library {folder} is not a folder: give the one that holds your adapters")
    files = [*path.glob("*.safetensors"), *path.glob(f"*/{FILE_NAME}")]
    return [adapter for file in sorted(files) if not file.name.startswith(".") for adapter in _read_file(file)]


def _read_file(file: Path) -> list[NamedAdapter]:
    if not file.name.endswith(SUFFIX):
        return [NamedAdapter(_name(file), str(file))]
    try:
        return subjects_of_pack(file)
    except UserError as error:
        log.warning("%s; its subjects are skipped", error)
        return []


def subjects_of_pack(file: Path) -> list[NamedAdapter]:
    """The subjects of a pack, each named ``PACK#NAME``. Raises :class:`UserError` if it is damaged."""
    pack = file.name.removesuffix(SUFFIX)
    return [NamedAdapter(tag_name(f"{pack}#{_name(info.path)}"), info.path, info=info) for info in list_pack(file)]


def name_adapters(adapters: Sequence[tuple[str, float]]) -> list[NamedAdapter]:
    """``(path, weight)`` pairs as adapters that are active by default.

    Raises :class:`UserError` if two of them have the same name.
    """
    named = [NamedAdapter(name := _name(path), path, Tag(name, weight, weight)) for path, weight in adapters]
    for one, two in combinations(named, 2):
        if one.name == two.name:
            raise UserError(f"{one.path} and {two.path} are both named {one.name!r}: give one of them, or rename it")
    return named


def find_adapter(tag: Tag, adapters: list[NamedAdapter]) -> NamedAdapter:
    """The adapter that ``tag`` names.

    An adapter of that name wins over the subject ``PACK#NAME`` of a pack, and one given by path over one of a library.
    Raises :class:`UserError` if there is none, or more than one.
    """
    found = [adapter for adapter in adapters if adapter.name == tag.name]
    found = found or [adapter for adapter in adapters if adapter.name.endswith(f"#{tag.name}")]
    found = [adapter for adapter in found if adapter.default] or found
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{tag} may mean {' or '.join(a.path for a in found)}: rename one")
    names = [adapter.name for adapter in adapters]
    near = difflib.get_close_matches(tag.name, names, 3) or names[:10]
    hint = f"there is {', '.join(near)}" if near else "none was given (--adapter, --library; of a server --subjects)"
    raise UserError(f"{tag} names no known adapter: {hint}")


def _name(path: str | Path) -> str:
    return tag_name(given_name(path))
