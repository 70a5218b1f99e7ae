"""Plots: coordinates, ticks, and escaping."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree

import pytest

from nora_diffusion.reports.plots import (
    STYLES,
    bar_chart,
    column_chart,
    legend,
    line_chart,
    log_ticks,
    short,
    styled,
    ticks,
)


@pytest.mark.parametrize("low, high", [(0, 1), (0.013, 0.0131), (-5, 3), (7, 7), (0, 0), (1, 2000), (1e-9, 3e-9)])
def test_ticks_enclose_and_are_few(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert marks[0] <= low + 1e-12 and marks[-1] >= high - 1e-12 and 2 <= len(marks) <= 8
    steps = [b - a for a, b in itertools.pairwise(marks)]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_ticks_of_whole_numbers_are_whole() -> None:
    assert ticks(2, 4, whole=True) == [2, 3, 4] and ticks(1, 12, whole=True) == [0, 5, 10, 15]


@pytest.mark.parametrize(
    "low, high, marks",
    [
        (1, 64, [1, 2, 5, 10, 20, 50, 100]),
        (3e-4, 4.8e-3, [2e-4, 5e-4, 1e-3, 2e-3, 5e-3]),
        (2e4, 1.4e7, [1e4, 3e4, 1e5, 3e5, 1e6, 3e6, 1e7, 3e7]),
        (1, 10_000, [1, 10, 100, 1000, 10_000]),
        (5, 5, [5, 10]),
        (1, 1e15, [1, 1e3, 1e6, 1e9, 1e12, 1e15]),
    ],
)
def test_logarithmic_ticks(low: float, high: float, marks: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(marks)


def test_equal_ratios_are_equally_far_apart_on_logarithmic_axes() -> None:
    svg = line_chart("Cost", {"cost": [(1, 1), (10, 10), (100, 100)]}, "size", "ms", log_x=True, log_y=True)
    points = ElementTree.fromstring(svg).findall(".//polyline")[0].attrib["points"].split()
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)


def test_a_line_goes_through_its_points() -> None:
    svg = line_chart("Loss", {"loss": [(0, 0.0), (50, 1.0), (100, float("nan"))]}, "step", "loss")
    root = ElementTree.fromstring(svg)
    points = [tuple(map(float, p.split(","))) for p in root.findall(".//polyline")[0].attrib["points"].split()]
    assert len(points) == 2 and points[0][0] < points[1][0]
    assert points[0][1] == 180 and points[1][1] == 12  # SVG's y axis points down: 0 is at the bottom, 1 at the top
    assert "from 0 to" in root.find("svg").attrib["aria-label"]  # type: ignore[union-attr]


def test_bars_are_as_long_as_their_values() -> None:
    root = ElementTree.fromstring(bar_chart("Norms", [("a", 2.0), ("b", 1.0), ("c", 0.0)], "norm"))
    lengths = [float(rect.attrib["width"]) for rect in root.findall(".//rect")]
    assert lengths[0] == pytest.approx(2 * lengths[1], abs=0.2) and lengths[2] == 0


def test_columns_are_as_high_as_their_values_and_named() -> None:
    root = ElementTree.fromstring(column_chart("Ranks", [("a", 4.0), ("b", 1.0), ("c", 0.0)], "layer", "rank"))
    heights = [float(rect.attrib["height"]) for rect in root.findall(".//rect")]
    assert heights[0] == pytest.approx(4 * heights[1], abs=0.5) and heights[2] == 0
    assert [title.text for title in root.findall(".//rect/title")] == ["a: 4", "b: 1", "c: 0"]
    assert "wide" in column_chart("Ranks", [("a", 1.0)] * 100, "layer", "rank")


def test_text_is_escaped() -> None:
    evil = '"><script>alert(1)</script>'
    charts = [line_chart(evil, {evil: [(0, 1)], "b": [(1, 2)]}, evil, evil), bar_chart(evil, [(evil, 1.0)], evil)]
    for svg in (*charts, column_chart(evil, [(evil, 1.0)], evil, evil)):
        ElementTree.fromstring(svg)
        assert not re.search(r"<script", svg)


def test_thirty_lines_look_different_and_share_a_legend() -> None:
    styles = styled(map(str, range(30)))
    assert len({*styles.values()}) == 30 and styled(map(str, range(len(STYLES) + 1)))[str(len(STYLES))] == STYLES[0]
    charts = [line_chart("a", {label: [(1, 2), (2, 3)]}, "x", "y", styles=styles) for label in styles]
    assert len({*charts}) == 30 and not any("legend" in chart for chart in charts)
    assert legend(styles).count("<span>") == 30 and len({*re.findall("<i .*?</i>", legend(styles))}) == 30


def test_a_wide_chart_names_its_lines_where_there_is_room() -> None:
    far = {"one": [(1.0, 0.0)], "two": [(10.0, 1.0)]}
    assert re.findall('class="name".*?>(.*?)<', line_chart("a", far, "x", "y", wide=True)) == ["one", "two"]
    assert 'class="name"' not in line_chart("a", far, "x", "y")
    same = {str(n): [(1.0, 0.0)] for n in range(9)}  # on one point: right, left, above and below
    assert re.findall('class="name".*?>(.*?)<', line_chart("a", same, "x", "y", wide=True)) == ["0", "1", "2", "3"]


def test_large_numbers_are_short() -> None:
    assert [*map(short, (0.0048, 75, 1000, 10_000, 564_736, 2e6))] == ["0.0048", "75", "1000", "10k", "564.7k", "2M"]


def test_no_plot_without_points() -> None:
    assert line_chart("a", {"b": []}, "x", "y") == "" and bar_chart("a", [], "x") == ""
    assert column_chart("a", [], "x", "y") == ""
    assert line_chart("a", {"b": [(1, float("nan"))]}, "x", "y") == ""
