"""Small SVG plots that scale with the page and use its colors, without scripts. All text is escaped."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 480, 220
LEFT, RIGHT, TOP, BOTTOM = 68, 24, 12, 40
COLORS = ("var(--color-accent)", "#0d9488", "#c2410c", "#a21caf", "#4d7c0f", "#0369a1", "#b91c1c", "#525252")
ROW, LABEL, LONGEST = 20, 190, 28

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels, linearly or by their logarithm; the first and the last tick are its ends."""

    ticks: Sequence[float]
    start: float
    end: float
    log: bool = False

    def pixel(self, value: float) -> float:
        """The coordinate of a value."""
        low, here, high = (math.log(v) if self.log else v for v in (self.ticks[0], value, self.ticks[-1]))
        return self.start + (here - low) / (high - low) * (self.end - self.start)


def line_chart(
    name: str, series: Mapping[str, Points], x_label: str, y_label: str, *, log_x: bool = False, log_y: bool = False
) -> str:
    """Lines over a common x axis; a series with a single point is a dot. Empty series are omitted.

    On a logarithmic axis, values must be positive.
    """
    drawn = {label: points for label, points in series.items() if points}
    if not drawn:
        return ""
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points if math.isfinite(y)]
    if not ys:
        return ""
    whole = all(float(x).is_integer() for x in xs)
    x_ticks = log_ticks(min(xs), max(xs)) if log_x else ticks(min(xs), max(xs), whole=whole)
    y_ticks = log_ticks(min(ys), max(ys)) if log_y else ticks(min(ys), max(ys))
    x_axis, y_axis = Axis(x_ticks, LEFT, WIDTH - RIGHT, log_x), Axis(y_ticks, HEIGHT - BOTTOM, TOP, log_y)
    parts = [_grid(x_axis, y_axis, x_label, y_label)]
    for number, points in enumerate(drawn.values()):
        color = COLORS[number % len(COLORS)]
        pixels = [(x_axis.pixel(x), y_axis.pixel(y)) for x, y in points if math.isfinite(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        if len(pixels) <= 20:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in pixels]
    legend = _legend(list(drawn)) if len(drawn) > 1 else ""
    ranges = "; ".join(f"{label}: from {p[0][1]:.3g} to {p[-1][1]:.3g}" for label, p in drawn.items())
    return _figure(name, f"{name}, {y_label} over {x_label}. {ranges}", HEIGHT, "".join(parts), legend)


def bar_chart(name: str, bars: Sequence[tuple[str, float]], value_label: str) -> str:
    """Horizontal bars with their labels and values, in the order given."""
    if not bars:
        return ""
    top = max(max(value for _, value in bars), 1e-30)
    room = WIDTH - LABEL - 60
    parts = []
    for number, (label, value) in enumerate(bars):
        y = number * ROW
        short = label if len(label) <= LONGEST else "…" + label[1 - LONGEST :]
        length = room * max(value, 0.0) / top
        parts.append(
            f'<g><title>{html.escape(label)}: {value:.4g}</title><text x="{LABEL - 6}" y="{y + 14}" text-anchor="end">'
            f'{html.escape(short)}</text><rect x="{LABEL}" y="{y + 4}" width="{length:.1f}" height="{ROW - 8}" rx="2" '
            f'fill="{COLORS[0]}"/><text x="{LABEL + length + 5:.1f}" y="{y + 14}">{value:.3g}</text></g>'
        )
    description = f"{name}, {value_label}: " + "; ".join(f"{label} {value:.3g}" for label, value in bars[:10])
    return _figure(name, description, len(bars) * ROW + 4, "".join(parts), "")


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About ``count`` evenly spaced round numbers (``whole``: integers) that enclose ``[low, high]``."""
    if not high > low:
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    raw = (high - low) / (count - 1)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    step = math.ceil(step) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """At most ``most`` round positive numbers that enclose ``[low, high]``: 1, 2, 5, 10, ..., or powers of 10."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for factors in ((1, 2, 5), (1,)):
        marks = [factor * 10.0**decade for decade in decades for factor in factors]
        first = max(i for i, mark in enumerate(marks) if mark <= low * (1 + 1e-9))
        last = min(i for i, mark in enumerate(marks) if mark >= high * (1 - 1e-9))
        marks = marks[first : max(last, first + 1) + 1]
        if len(marks) <= most:
            return marks
    stride = math.ceil((len(marks) - 1) / (most - 1))
    return [marks[0] * 10.0**decade for decade in range(0, len(marks) - 1 + stride, stride)]


def _grid(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> str:
    parts = []
    for value in y_axis.ticks:
        y = y_axis.pixel(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="rule"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in x_axis.ticks:
        x = x_axis.pixel(value)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(x_label)}</text>'
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{html.escape(y_label)}'
        "</text>"
    )
    return "".join(parts)


def _legend(labels: Sequence[str]) -> str:
    spans = [
        f'<span><i style="background:{COLORS[number % len(COLORS)]}"></i>{html.escape(label)}</span>'
        for number, label in enumerate(labels)
    ]
    return f'<div class="legend">{"".join(spans)}</div>'


def _figure(name: str, description: str, height: int, content: str, legend: str) -> str:
    return (
        f'<figure class="plot"><figcaption>{html.escape(name)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(description)}">{content}</svg>'
        f"{legend}</figure>"
    )
