"""``report.md``: means, paired differences with intervals, and the right images of each pair of subjects."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ...reports.markdown import table
from ...results.ranking import Estimate, paired
from .pairs import KINDS

REFERENCE = "plain"
"""The mode that the others are compared with."""
RIGHT = "both right"
COMPARED = (RIGHT, "lost", "own", "other")
"""The scores whose differences are reported."""
Row = dict[str, Any]
"""A mode and a pair; ``scores`` has a value for each image, by background and seed."""


def report(rows: Sequence[Row], accuracy: float) -> str:
    """Means over all images, differences to the plain sum, and the share of images that are right in each pair."""
    modes, pairs = (list(dict.fromkeys(row[key] for row in rows)) for key in ("mode", "pair"))
    parts = [f"The probe names {accuracy:.3f} of the objects in rendered scenes.", _means(rows, modes)]
    if REFERENCE in modes and len(modes) > 1:
        parts += [
            f"Minus `{REFERENCE}`'s, of the same pair and background; in brackets 95% bootstrap intervals, over pairs "
            "and then backgrounds:",
            _differences(rows, modes),
        ]
    parts += [f"{RIGHT.capitalize()}, by pair:", _by_pair(rows, modes, pairs)]
    return "\n\n".join(parts) + "\n"


def _means(rows: Sequence[Row], modes: Sequence[str]) -> str:
    names = list(rows[0]["scores"])
    lines = []
    for mode in modes:
        own = [row for row in rows if row["mode"] == mode]
        means = [f"{statistics.fmean(_scenes(own, name).values()):.3f}" for name in names]
        lines.append([mode, *means, f"{statistics.fmean(row['seconds'] for row in own):.2f}"])
    return table(["mode", *names, "CPU seconds"], lines)


def _differences(rows: Sequence[Row], modes: Sequence[str]) -> str:
    names = [name for name in COMPARED if name in rows[0]["scores"]]
    lines = [
        [mode, *(gap.text("+.3f") if (gap := difference(rows, mode, name)) else "" for name in names)]
        for mode in modes
        if mode != REFERENCE
    ]
    return table(["mode", *names], lines)


def difference(rows: Sequence[Row], mode: str, score: str) -> Estimate | None:
    """How much higher a score is than :data:`REFERENCE`'s; ``None`` without a common pair of subjects."""
    return paired(*(_scenes([row for row in rows if row["mode"] == m], score) for m in (mode, REFERENCE)))


def _scenes(rows: Sequence[Row], score: str) -> dict[tuple[str, int], float]:
    """The mean over the seeds of each pair and background: images of one prompt are no independent scenes."""
    found = {}
    for row in rows:
        values = row["scores"][score]
        seeds = len(values) // len(KINDS)
        for number in range(len(KINDS)):
            found[row["pair"], number] = statistics.fmean(values[number * seeds : (number + 1) * seeds])
    return found


def _by_pair(rows: Sequence[Row], modes: Sequence[str], pairs: Sequence[str]) -> str:
    shares = {(row["mode"], row["pair"]): f"{statistics.fmean(row['scores'][RIGHT]):.3f}" for row in rows}
    return table(["mode", *pairs], [[mode, *(shares.get((mode, pair), "") for pair in pairs)] for mode in modes])
