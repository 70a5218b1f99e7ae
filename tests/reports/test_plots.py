"""Plots: coordinates, ticks, and escaping."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree

import pytest

from nora_diffusion.reports.plots import bar_chart, line_chart, ticks


@pytest.mark.parametrize("low, high", [(0, 1), (0.013, 0.0131), (-5, 3), (7, 7), (0, 0), (1, 2000), (1e-9, 3e-9)])
def test_ticks_enclose_and_are_few(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert marks[0] <= low + 1e-12 and marks[-1] >= high - 1e-12 and 2 <= len(marks) <= 8
    steps = [b - a for a, b in itertools.pairwise(marks)]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_ticks_of_whole_numbers_are_whole() -> None:
    assert ticks(2, 4, whole=True) == [2, 3, 4] and ticks(1, 12, whole=True) == [0, 5, 10, 15]


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


def test_text_is_escaped() -> None:
    evil = '"><script>alert(1)</script>'
    for svg in (line_chart(evil, {evil: [(0, 1)], "b": [(1, 2)]}, evil, evil), bar_chart(evil, [(evil, 1.0)], evil)):
        ElementTree.fromstring(svg)
        assert not re.search(r"<script", svg)


def test_no_plot_without_points() -> None:
    assert line_chart("a", {"b": []}, "x", "y") == "" and bar_chart("a", [], "x") == ""
    assert line_chart("a", {"b": [(1, float("nan"))]}, "x", "y") == ""
