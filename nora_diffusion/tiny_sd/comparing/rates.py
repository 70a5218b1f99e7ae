"""Learning rates: which is best for each subject, and which are still to be tried."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .lessons import Row

START = (1.2e-3, 2.4e-3, 4.8e-3)
"""The first rates of ``--rates auto``; more follow by factors of 2."""
MOST = 12
"""Rates that a method may try."""


def best_rate(rows: Sequence[Row], method: str, subject: str) -> float | None:
    """The rate with the lowest mean held-out loss on the subjects other than ``subject``; on itself if it is alone.

    Choosing the rate on the lessons that are reported would favor the method with the larger noise.
    """
    own = [row for row in rows if row["method"] == method]
    others = [row for row in own if row["subject"] != subject] or own
    rates = dict.fromkeys(row["rate"] for row in others)
    return min(rates, key=lambda r: statistics.fmean(row["heldout_loss"] for row in others if row["rate"] == r))


def at_best_rate(rows: Sequence[Row], method: str) -> list[Row]:
    """A method's lessons, each subject's at its :func:`best_rate`."""
    own = [row for row in rows if row["method"] == method]
    best = {subject: best_rate(rows, method, subject) for subject in dict.fromkeys(row["subject"] for row in own)}
    return [row for row in own if row["rate"] == best[row["subject"]]]


def next_rates(rows: Sequence[Row], method: str) -> list[float]:
    """The rates to try next, so that the best one of every subject lies inside the list; empty if it does."""
    rates = sorted({row["rate"] for row in rows if row["method"] == method})
    if not rates:
        return list(START)
    best = {row["rate"] for row in at_best_rate(rows, method)}
    found = []
    if rates[-1] in best:
        found.append(2 * rates[-1])
    if rates[0] in best:
        found.append(rates[0] / 2)
    return found[: MOST - len(rates)] if len(rates) < MOST else []
