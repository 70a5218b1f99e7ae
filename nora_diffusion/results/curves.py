"""The curves of a leaderboard: scores over trained parameters, file size, learning rate and steps."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..reports.plots import COLORS, legend, line_chart, styled
from .protocols import Protocol
from .ranking import Ranking, Standing

Series = dict[str, list[tuple[float, float]]]
Title = Callable[[str], str]
SIZES = ("rank", "inner_rank")
"""The settings in which the methods of one line differ."""


class Chart(NamedTuple):
    """The lines of a chart by their labels."""

    name: str
    series: Series
    x_label: str
    y_label: str


def charts(ranking: Ranking, lengths: Sequence[Ranking], title: Title) -> str:
    """All curves of a protocol, but of scores that never differ.

    ``lengths``: the same protocol with other numbers of steps, itself included.
    """
    protocol, criterion = ranking.protocol, ranking.protocol.criterion
    own, by_size = title(criterion), []
    for score in [criterion, *(name for name in protocol.scores if name != criterion)]:
        series = _by_family(ranking, score, lambda standing: standing.trained_parameters)
        if score == criterion or len({y for points in series.values() for _, y in points}) > 1:
            by_size.append(Chart(f"{title(score)} over size", series, "trained parameters", title(score)))
    series = _by_family(ranking, criterion, lambda standing: standing.bytes)
    by_size.append(Chart(f"{own} over file size", series, "bytes", own))
    styles = styled(sorted({label for chart in by_size for label in chart.series}))
    plots = [
        *(_drawn(chart, styles=styles, wide=chart is by_size[0]) for chart in by_size),
        *_several(Chart(f"{own} over rates", _over_rates(protocol), "learning rate", own)),
        *_several(Chart(f"{own} over steps", _over_steps(lengths), "steps", own)),
    ]
    return f'<section>{legend(styles)}<div class="plots">{"".join(plots)}</div></section>'


def families(protocol: Protocol) -> dict[str, str]:
    """The line of each trained method: methods share one that differ in :data:`SIZES` alone, as LoRAs of several ranks.

    It is called as their setting ``method``, and by what is unusual among the lines of that name: a setting that
    others do not have, or that is otherwise in most of their rows.
    """
    kinds = {name: str(protocol.methods[name].get("method", name)) for name in protocol.trained}
    fixed = {name: _fixed(protocol.methods[name]) for name in kinds}
    kin: dict[str, list[dict[str, str]]] = {}
    for name, kind in kinds.items():
        kin.setdefault(kind, []).extend([fixed[name]] * len(protocol.of(name)))
    usual = {kind: _usual(own) for kind, own in kin.items()}
    found = {}
    for name, kind in kinds.items():
        odd = [f"{key}={value}" for key, value in fixed[name].items() if value != usual[kind].get(key)]
        found[name] = ":".join(filter(None, (kind, ",".join(odd))))
    return found


def _fixed(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings that a line's methods have in common, as text."""
    return {key: _text(value) for key, value in settings.items() if key not in (*SIZES, "method")}


def _text(value: Any) -> str:
    """As in the name of a method: ``attn+ff``, ``true``."""
    return "+".join(map(str, value)) if isinstance(value, list) else str(value).lower()


def _usual(kin: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The values that settings have in most rows; without settings that some do not have."""
    common = [key for key in kin[0] if all(key in own for own in kin)]
    return {key: Counter(own[key] for own in kin).most_common(1)[0][0] for key in common}


def _by_family(ranking: Ranking, score: str, x: Callable[[Standing], int]) -> Series:
    names, series = families(ranking.protocol), Series()
    for standing in ranking.standings:
        if score in standing.scores and x(standing) > 0 and math.isfinite(standing.scores[score].mean):
            points = series.setdefault(names[standing.method], [])
            points.append((float(x(standing)), standing.scores[score].mean))
    return {name: sorted(points) for name, points in series.items()}


def _over_rates(protocol: Protocol) -> Series:
    """The criterion of each method at each of its rates, if there are several."""
    series: Series = {}
    for method in protocol.trained:
        values: dict[float, list[float]] = {}
        for row in protocol.of(method):
            if row.rate is not None and math.isfinite(row.scores.get(protocol.criterion, math.inf)):
                values.setdefault(row.rate, []).append(row.scores[protocol.criterion])
        series[method] = [(rate, statistics.fmean(own)) for rate, own in sorted(values.items())]
    return _curves(series)


def _over_steps(lengths: Sequence[Ranking]) -> Series:
    """The criterion of each method at its chosen rates, if it was trained for several numbers of steps."""
    series: Series = {}
    for ranking in sorted(lengths, key=lambda ranking: ranking.protocol.steps):
        for standing in ranking.standings:
            if math.isfinite(mean := standing.scores[ranking.protocol.criterion].mean):
                series.setdefault(standing.method, []).append((float(ranking.protocol.steps), mean))
    return _curves(series)


def _curves(series: Series) -> Series:
    return {name: points for name, points in series.items() if len(points) > 1}


def _several(chart: Chart) -> list[str]:
    """As many charts as it takes for each line to have a color of its own; a single line is named in the title."""
    labels = sorted(chart.series)
    count = math.ceil(len(labels) / len(COLORS))
    parts = [labels[len(labels) * n // count : len(labels) * (n + 1) // count] for n in range(count)]
    notes = [f" ({n})" for n in range(1, count + 1)] if count > 1 else [f": {labels[0]}" if len(labels) == 1 else ""]
    return [
        _drawn(chart._replace(name=chart.name + note, series={label: chart.series[label] for label in part}))
        for note, part in zip(notes, parts, strict=False)
    ]


def _drawn(chart: Chart, **options: Any) -> str:
    name = chart.name[:1].upper() + chart.name[1:]  # CLIP-I stays as it is
    return line_chart(name, chart.series, chart.x_label, chart.y_label, log_x=True, **options)
