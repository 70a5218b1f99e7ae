"""The adapters of an evaluation, as the command line names them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..generation.addresses import parse_adapter, split_label
from .axes import NONE

BASE = "base"


@dataclass(frozen=True)
class Contender:
    """One row of the table: a label, an adapter's path (``None``: the base alone) and its weight."""

    label: str
    path: str | None
    weight: float = 1.0

    def adapter(self, subject: str) -> str | None:
        """The path of a subject's adapter."""
        return None if self.path is None else self.path.replace("{subject}", subject)


def parse_contender(text: str) -> Contender:
    """Parse ``[label=]path[:weight]``; the default label is the path's name. Raises :class:`UserError`."""
    label, rest = split_label(text)
    path, weight = parse_adapter(rest)
    if path in NONE:
        raise UserError("the base alone is always evaluated: name adapters only")
    label = label or Path(path).name.replace("{subject}", "").strip("-_. ") or Path(path).parent.name
    if not label.strip() or label == BASE:
        raise UserError(f"{text!r} needs another label: write for example nora={path}")
    return Contender(label.strip(), path, weight)
