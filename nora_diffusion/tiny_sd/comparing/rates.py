"""Learning rates: which is best for each subject, and which are still to be tried."""

from __future__ import annotations

from collections.abc import Sequence

from ...results.ranking import Tried, chosen
from .lessons import Row

START = (1.2e-3, 2.4e-3, 4.8e-3)
"""The first rates of ``--rates auto``; more follow by factors of 2."""
MOST = 12
"""Rates that a method may try."""


def at_best_rate(rows: Sequence[Row], method: str) -> list[Row]:
    """A method's lessons, each subject's at the rate with the lowest held-out loss on the other subjects."""
    own = [row for row in rows if row["method"] == method]
    return chosen(own, [Tried(row["subject"], row["rate"], row["heldout_loss"]) for row in own])


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
