"""The curves of a leaderboard: scores over trained parameters, file size, learning rate and steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from ..reports.plots import COLORS, line_chart
from .protocols import Protocol
from .ranking import Ranking, Standing

Series = dict[str, list[tuple[float, float]]]
Title = Callable[[str], str]


def charts(ranking: Ranking, lengths: Sequence[Ranking], title: Title) -> str:
    """All curves of a protocol, but of scores that never differ.

    ``lengths``: the same protocol with other numbers of steps, itself included.
    """
    protocol, criterion = ranking.protocol, ranking.protocol.criterion
    plots = []
    for score in [criterion, *(name for name in protocol.scores if name != criterion)]:
        series = _by_family(ranking, score, lambda standing: standing.trained_parameters)
        if score == criterion or len({y for points in series.values() for _, y in points}) > 1:
            plots += _line_charts(f"{title(score)} over size", series, "trained parameters", title(score))
    series = _by_family(ranking, criterion, lambda standing: standing.bytes)
    plots += _line_charts(f"{title(criterion)} over file size", series, "bytes", title(criterion))
    plots += _line_charts(f"{title(criterion)} over rates", _over_rates(protocol), "learning rate", title(criterion))
    plots += _line_charts(f"{title(criterion)} over steps", _over_steps(lengths), "steps", title(criterion))
    return f'<div class="plots">{"".join(plots)}</div>'


def family(settings: Mapping[str, object], method: str) -> str:
    """Methods of one family, such as LoRAs of several ranks, share a line."""
    return str(settings.get("method", method))


def _by_family(ranking: Ranking, score: str, x: Callable[[Standing], int]) -> Series:
    series: Series = {}
    for standing in ranking.standings:
        if score in standing.scores and x(standing) > 0 and math.isfinite(standing.scores[score].mean):
            name = family(ranking.protocol.methods[standing.method], standing.method)
            series.setdefault(name, []).append((float(x(standing)), standing.scores[score].mean))
    return {name: sorted(points) for name, points in series.items()}


def _over_rates(protocol: Protocol) -> Series:
    """The criterion of each method at each of its rates."""
    series: Series = {}
    for method in protocol.trained:
        values: dict[float, list[float]] = {}
        for row in protocol.of(method):
            if row.rate is not None and math.isfinite(row.scores.get(protocol.criterion, math.inf)):
                values.setdefault(row.rate, []).append(row.scores[protocol.criterion])
        series[method] = [(rate, statistics.fmean(own)) for rate, own in sorted(values.items())]
    return series


def _over_steps(lengths: Sequence[Ranking]) -> Series:
    """The criterion of each method at its chosen rates."""
    series: Series = {}
    for ranking in sorted(lengths, key=lambda ranking: ranking.protocol.steps):
        for standing in ranking.standings:
            if math.isfinite(mean := standing.scores[ranking.protocol.criterion].mean):
                series.setdefault(standing.method, []).append((float(ranking.protocol.steps), mean))
    return {method: points for method, points in series.items() if len(points) > 1}


def _line_charts(name: str, series: Series, x_label: str, y_label: str) -> list[str]:
    """As many charts as it takes for each line to have a color of its own."""
    drawn = sorted((label, points) for label, points in series.items() if points)  # one color in all protocols
    parts = [dict(drawn[start : start + len(COLORS)]) for start in range(0, len(drawn), len(COLORS))]
    return [
        line_chart(name.capitalize() if len(parts) == 1 else f"{name.capitalize()} ({number})", part, x_label, y_label,
                   log_x=True)
        for number, part in enumerate(parts, start=1)
    ]  # fmt: skip
