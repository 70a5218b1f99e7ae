"""``curves.html``: scores over learning rates and over trained parameters."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ...reports import webpage
from ...reports.plots import line_chart
from .lessons import Row, title
from .rates import at_best_rate
from .tables import measured, methods_of


def page(rows: Sequence[Row]) -> str:
    """Held-out loss and subject score of each method over its rates, and its best loss over its parameters."""
    methods = methods_of(rows, trained=True)
    charts = [_over_rates(rows, methods, name) for name in ("heldout_loss", "subject_score") if name in measured(rows)]
    best = {
        method: [(float(own[0]["trained_numbers"]), statistics.fmean(row["heldout_loss"] for row in own))]
        for method in methods
        if (own := at_best_rate(rows, method))
    }
    charts.append(line_chart("Held-out loss at the best rate", best, "trained parameters", "held-out loss", log_x=True))
    return webpage.page("Comparing methods", [f'<div class="plots">{"".join(charts)}</div>'])


def _over_rates(rows: Sequence[Row], methods: Sequence[str], name: str) -> str:
    series = {}
    for method in methods:
        by_rate: dict[float, list[float]] = {}
        for row in rows:
            if row["method"] == method and math.isfinite(row[name]):
                by_rate.setdefault(row["rate"], []).append(row[name])
        series[method] = [(rate, statistics.fmean(values)) for rate, values in sorted(by_rate.items())]
    label = title(name)
    return line_chart(label.capitalize(), series, "learning rate", label, log_x=True)
