"""How many replicas run, as ``--replicas`` says it."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import UserError, quoted

MOST = 1000


@dataclass(frozen=True)
class Scale:
    """Between ``least`` and ``most`` replicas run, depending on the pictures that are at work."""

    least: int
    most: int


def parse_scale(text: str) -> Scale:
    """``2``, or ``1:4`` for 1 to 4. Raises :class:`UserError`."""
    least, _, most = text.partition(":")
    try:
        scale = Scale(int(least), int(most or least))
    except ValueError:
        raise UserError(f"--replicas {quoted(text)}: give a number such as 2, or two such as 1:4") from None
    if not 1 <= scale.least <= scale.most <= MOST:
        raise UserError(f"--replicas {quoted(text)}: give 1 to {MOST}, the smaller number first")
    return scale
