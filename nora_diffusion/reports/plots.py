"""Small SVG plots that scale with the page and use its colors, without scripts. All text is escaped."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 480, 220
LEFT, RIGHT, TOP, BOTTOM = 68, 24, 12, 40
COLORS = ("var(--color-accent)", "#0d9488", "#c2410c", "#a21caf", "#4d7c0f", "#0369a1", "#b91c1c", "#525252")
ROW, LABEL, LONGEST = 20, 190, 28

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Style:
    """What tells a series from the others. ``corners``: of its marker, within -1 and 1; a dot has none."""

    color: str
    corners: Points = ()
    dashes: str = ""

    def marker(self, x: float, y: float, text: str) -> str:
        """The SVG of a point; ``text`` is shown when the pointer rests on it."""
        note = f"<title>{html.escape(text)}</title>"
        if not self.corners:
            return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{self.color}">{note}</circle>'
        corners = " ".join(f"{x + 4.2 * dx:.1f},{y + 4.2 * dy:.1f}" for dx, dy in self.corners)
        return f'<polygon points="{corners}" fill="{self.color}">{note}</polygon>'

    @property
    def swatch(self) -> str:
        """The HTML of the marker in a legend."""
        corners = ",".join(f"{50 + 50 * dx:.0f}% {50 + 50 * dy:.0f}%" for dx, dy in self.corners)
        shape = f"border-radius:0;clip-path:polygon({corners})" if corners else "border-radius:50%"
        return f'<i style="background:{self.color};{shape}"></i>'


SHAPES: Sequence[tuple[Points, str]] = (
    ((), ""),
    (((0, -1), (1, 0), (0, 1), (-1, 0)), "6 3"),
    (((0, -1), (1, 0.8), (-1, 0.8)), "2 3"),
    (((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)), "8 3 2 3"),
)
STYLES = tuple(Style(color, *shape) for shape in SHAPES for color in COLORS)
"""First all colors with dots and plain lines, then with diamonds and dashes, and so on."""


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
    name: str, series: Mapping[str, Points], x_label: str, y_label: str, *, log_x: bool = False, log_y: bool = False,
    styles: Mapping[str, Style] | None = None, wide: bool = False,
) -> str:  # fmt: skip
    """Lines over a common x axis; a series with a single point is a dot. Empty series are omitted.

    On a logarithmic axis, values must be positive. ``styles``: those of a :func:`legend` that several charts share;
    without them the chart has its own. ``wide``: as wide as two, with names beside the lines
    where there is room.
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
    width, height = (2 * WIDTH, 2 * HEIGHT) if wide else (WIDTH, HEIGHT)
    x_axis, y_axis = Axis(x_ticks, LEFT, width - RIGHT, log_x), Axis(y_ticks, height - BOTTOM, TOP, log_y)
    parts = [_grid(x_axis, y_axis, x_label, y_label)]
    own = styles or styled(drawn)
    pixels = {
        label: [(x_axis.pixel(x), y_axis.pixel(y)) for x, y in points if math.isfinite(y)]
        for label, points in drawn.items()
    }
    for label, points in drawn.items():
        notes = [f"{label}: {y:.4g} at {short(x)}" for x, y in points if math.isfinite(y)]
        parts.append(_line(pixels[label], notes, own[label]))
    parts += _names(pixels, own, width) if wide else []
    key = legend(own) if styles is None and len(drawn) > 1 else ""
    ranges = "; ".join(f"{label}: from {p[0][1]:.3g} to {p[-1][1]:.3g}" for label, p in drawn.items())
    return _figure(name, f"{name}, {y_label} over {x_label}. {ranges}", (width, height), "".join(parts), key)


def styled(labels: Iterable[str]) -> dict[str, Style]:
    """A style for each label, by their order."""
    return dict(zip(labels, itertools.cycle(STYLES), strict=False))


def legend(styles: Mapping[str, Style]) -> str:
    """The labels with their markers."""
    spans = [f"<span>{style.swatch}{html.escape(label)}</span>" for label, style in styles.items()]
    return f'<div class="legend">{"".join(spans)}</div>'


def _line(pixels: Points, notes: Sequence[str], style: Style) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
    dashes = f' stroke-dasharray="{style.dashes}"' if style.dashes else ""
    line = f'<polyline points="{path}" fill="none" stroke="{style.color}" stroke-width="2"{dashes}/>'
    if len(pixels) > 20:
        return line
    return line + "".join(style.marker(x, y, note) for (x, y), note in zip(pixels, notes, strict=True))


def _names(pixels: Mapping[str, Points], styles: Mapping[str, Style], width: float) -> Iterator[str]:
    """The label of each line at its last point: beside, above or below, unless all of these are taken."""
    taken = [(x - 5, y - 5, x + 5, y + 5) for points in pixels.values() for x, y in points]
    for label, points in pixels.items():
        long, (x, y) = 7 * len(label), points[-1] if points else (width, 0)
        for left, middle in ((x + 8, y), (x - 8 - long, y), (x - long / 2, y - 12), (x - long / 2, y + 12)):
            box = (left, middle - 6, left + long, middle + 6)
            if box[0] > LEFT and box[2] < width and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                style = f'class="name" style="fill:{styles[label].color}"'
                yield f'<text x="{left:.1f}" y="{middle + 4:.1f}" {style}>{html.escape(label)}</text>'
                break


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def short(value: float) -> str:
    """A number of at most four digits: 564.7k, 2M."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(factor, 1e4):
            return f"{value / factor:.4g}{unit}"
    return f"{value:.4g}"


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
    return _figure(name, description, (WIDTH, len(bars) * ROW + 4), "".join(parts), "")


def column_chart(name: str, columns: Sequence[tuple[str, float]], x_label: str, y_label: str) -> str:
    """Thin columns from 0, in the order given; the label and value of each show when the pointer rests on it."""
    if not columns:
        return ""
    width = 2 * WIDTH if len(columns) > 60 else WIDTH
    y_axis = Axis(ticks(0, max(value for _, value in columns)), HEIGHT - BOTTOM, TOP)
    step = (width - RIGHT - LEFT) / len(columns)
    parts = [_rules(y_axis, LEFT, width - RIGHT), _labels(x_label, y_label, (LEFT, width - RIGHT), y_axis)]
    for number, (label, value) in enumerate(columns):
        y = y_axis.pixel(value)
        parts.append(
            f'<rect x="{LEFT + (number + 0.1) * step:.1f}" y="{y:.1f}" width="{0.8 * step:.1f}" '
            f'height="{y_axis.start - y:.1f}" fill="{COLORS[0]}">'
            f"<title>{html.escape(label)}: {value:.4g}</title></rect>"
        )
    values = [value for _, value in columns]
    description = f"{name}, {y_label}: {len(values)} columns from {min(values):.3g} to {max(values):.3g}"
    return _figure(name, description, (width, HEIGHT), "".join(parts), "")


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
    """At most ``most`` round positive numbers that enclose ``[low, high]``: 1, 2, 5, 10; 1, 3, 10; or powers of 10."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        marks = [factor * 10.0**decade for decade in decades for factor in factors]
        first = max(i for i, mark in enumerate(marks) if mark <= low * (1 + 1e-9))
        last = min(i for i, mark in enumerate(marks) if mark >= high * (1 - 1e-9))
        marks = marks[first : max(last, first + 1) + 1]
        if len(marks) <= most:
            return marks
    stride = math.ceil((len(marks) - 1) / (most - 1))
    return [marks[0] * 10.0**decade for decade in range(0, len(marks) - 1 + stride, stride)]


def _grid(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> str:
    parts = [_rules(y_axis, x_axis.start, x_axis.end)]
    for value in x_axis.ticks:
        x = x_axis.pixel(value)
        parts.append(f'<text x="{x:.1f}" y="{y_axis.start + 16}" text-anchor="middle">{short(value)}</text>')
    return "".join([*parts, _labels(x_label, y_label, (x_axis.start, x_axis.end), y_axis)])


def _rules(y_axis: Axis, left: float, right: float) -> str:
    """A line and a number for each tick."""
    parts = []
    for value in y_axis.ticks:
        y = y_axis.pixel(value)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="rule"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    return "".join(parts)


def _labels(x_label: str, y_label: str, sides: tuple[float, float], y_axis: Axis) -> str:
    """The names of both axes; ``sides``: left and right."""
    middle = (y_axis.end + y_axis.start) / 2
    return (
        f'<text x="{sum(sides) / 2}" y="{y_axis.start + BOTTOM - 6}" text-anchor="middle">{html.escape(x_label)}</text>'
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{html.escape(y_label)}'
        "</text>"
    )


def _figure(name: str, description: str, size: tuple[int, int], content: str, key: str) -> str:
    return (
        f'<figure class="plot{" wide" if size[0] > WIDTH else ""}"><figcaption>{html.escape(name)}</figcaption>'
        f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{html.escape(description)}">{content}</svg>'
        f"{key}</figure>"
    )
