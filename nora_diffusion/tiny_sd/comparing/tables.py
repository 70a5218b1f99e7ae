"""``report.md``: the tables of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ...reports.markdown import table
from ...results.ranking import paired
from ...scoring.metrics import digits
from ..measures.methods import is_trained
from ..measures.scores import BETTER
from .lessons import Row, title
from .rates import at_best_rate

PAIRED = ("heldout_loss", "subject_score", "obeyed", "class_distance", "told_apart")
"""The scores whose differences to the first method are reported, where they were measured."""


def measured(rows: Sequence[Row]) -> list[str]:
    """The scores that all these lessons have, in the order of :data:`.scores.BETTER`."""
    return [name for name in BETTER if all(name in row for row in rows)]


def table_by_rate(rows: Sequence[Row]) -> str:
    """A row for each method and rate: mean over subjects ± standard deviation between seeds."""
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["rate"] or 0.0):
        groups.setdefault((row["method"], row["rate"]), []).append(row)
    names = measured(rows)
    header = ["method", "rate", *map(title, names), "trained parameters", "file", "CPU seconds"]
    lines = []
    for method in methods_of(rows):
        for rate in [rate for name, rate in groups if name == method]:
            group = groups[method, rate]
            costs = _costs(group) if rate is not None else ["", "", ""]
            lines.append([method, f"{rate:g}" if rate else "", *(_mean(group, name) for name in names), *costs])
    return table(header, lines)


def methods_of(rows: Sequence[Row], trained: bool = False) -> list[str]:
    """The methods in the order of their first lesson; ``trained``: without the base."""
    return [m for m in dict.fromkeys(row["method"] for row in rows) if is_trained(m) or not trained]


def _costs(group: Sequence[Row]) -> list[str]:
    seconds = statistics.median(row["cpu_seconds"] for row in group)
    trained = next((row for row in group if "error" not in row), group[0])
    return [f"{trained['trained_numbers']:,}", f"{trained['bytes'] / 1e6:.2f} MB", f"{seconds:.1f}"]


def _mean(group: Sequence[Row], name: str) -> str:
    by_seed: dict[int, list[float]] = {}
    for row in group:
        by_seed.setdefault(row["seed"], []).append(row[name])
    means, places = [statistics.fmean(values) for values in by_seed.values()], digits(name)
    deviation = f" ± {statistics.stdev(means):.{places}f}" if len(means) > 1 else ""
    return f"{statistics.fmean(means):.{places}f}{deviation}"


def table_at_best_rate(rows: Sequence[Row]) -> str:
    """Each trained method at its best rate, and its paired differences to the first one."""
    methods, names = methods_of(rows, trained=True), measured(rows)
    paired = [name for name in PAIRED if name in names]
    differences = [f"{title(name)}, minus {methods[0]}'s" for name in paired]
    header = ["method", "rate", "trained parameters", *map(title, names), *differences]
    lines = []
    for method in methods:
        own = at_best_rate(rows, method)
        rates = ", ".join(f"{rate:g}" for rate in sorted({row["rate"] for row in own}))
        means = [f"{statistics.fmean(row[n] for row in own):.{digits(n)}f}" for n in names]
        gaps = [difference(rows, method, methods[0], n) if method != methods[0] else "" for n in paired]
        lines.append([method, rates, f"{own[0]['trained_numbers']:,}", *means, *gaps])
    return table(header, lines)


def difference(rows: Sequence[Row], method: str, other: str, name: str) -> str:
    """The mean difference of two methods at their best rates, paired by subject and seed, with its 95% interval."""
    ours, theirs = ({(r["subject"], r["seed"]): r[name] for r in at_best_rate(rows, m)} for m in (method, other))
    gap = paired(ours, theirs)
    return gap.text(f"+.{digits(name)}f") if gap else ""


def report(rows: Sequence[Row]) -> str:
    """Both tables in Markdown."""
    subjects, seeds = (len({row[name] for row in rows}) for name in ("subject", "seed"))
    prompts = rows[0].get("prompts", [])
    images = f", ten images each of {', '.join(prompts)}" if prompts else ", no images"
    text = f"{subjects} subjects, {seeds} seeds{images}: mean over subjects ± deviation between seeds.\n"
    text += f"\n{table_by_rate(rows)}\n"
    if failed := [row for row in rows if "error" in row]:
        text += f"\n{len(failed)} lessons failed to train, and count with shares of 0 and an infinite loss.\n"
    if methods_of(rows, trained=True):
        text += (
            "\nEach subject at the rate with the lowest held-out loss on the other subjects. Differences are paired by "
            f"subject and seed, with 95% bootstrap intervals.\n\n{table_at_best_rate(rows)}\n"
        )
    return text
