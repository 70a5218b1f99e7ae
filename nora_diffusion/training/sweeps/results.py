"""The results of a sweep: one row per finished cell, as JSON that others can read, and as tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...formats.adapter_file import inspect_adapter
from ...io.files import write_atomic
from ...io.run_layout import MEASURED
from ...io.untrusted import parse_json
from ...reports.plots import line_chart
from ...reports.webpage import heading, page, table
from ...versions import versions
from ..planning.rundir import RunFolder, read_state
from .cells import Cell

FORMAT, VERSION = "nora_diffusion.results", 1
RESULTS, REPORT = "results.json", "report.html"
REPEATS = ("seed", "subject")
"""Axes over which a table averages."""


@dataclass(frozen=True)
class Row:
    """A finished cell. ``scores``: the training loss, and what the run's validation measured at the saved step."""

    labels: dict[str, str]
    settings: dict[str, Any]
    adapter_sha256: str
    base: str
    steps: int
    trained_parameters: int
    bytes: int
    seconds: float
    scores: dict[str, float]


def read_row(cell: Cell, out: Path) -> Row | None:
    """The row of a cell; ``None`` if it is not finished."""
    folder = RunFolder(out / cell.name)
    state = read_state(folder.path)
    if state.get("status") != "done" or not folder.adapter.exists():
        return None
    info = inspect_adapter(folder.adapter)
    loss = state.get("loss")
    scores = {"training_loss": loss} if isinstance(loss, float) else {}
    scores |= _validation(folder.path, info.step)
    return Row(
        dict(cell.labels), dict(cell.settings), info.sha256, info.base, info.step, info.trained_parameters,
        info.bytes, round(sum(seconds for _, _, seconds in folder.steps()), 3), scores,
    )  # fmt: skip


def _validation(folder: Path, step: int) -> dict[str, float]:
    """The scores that the run's validation measured at ``step``."""
    try:
        points = parse_json((folder / MEASURED).read_bytes())["points"]
        scores = next(point["scores"] for point in points if point["step"] == step)
        return {str(name): float(value) for name, value in scores.items()}
    except (OSError, ValueError, KeyError, TypeError, StopIteration, AttributeError):
        return {}


def write_results(name: str, cells: Sequence[Cell], out: Path) -> list[Row]:
    """Write ``results.json`` and ``report.html`` of the cells that are finished; return their rows."""
    rows = [row for cell in cells if (row := read_row(cell, out)) is not None]
    document = {
        "format": FORMAT, "version": VERSION, "study": name, "versions": versions(), "cells": len(cells),
        "rows": [asdict(row) for row in rows],
    }  # fmt: skip
    write_atomic(out / RESULTS, json.dumps(document, indent=1))
    write_atomic(out / REPORT, report(name, rows))
    return rows


def report(name: str, rows: Sequence[Row]) -> str:
    """The page of a sweep: means over subjects and seeds, a plot of each score, every cell."""
    parts = [heading("Means over subjects and seeds"), table(*_means(rows)), heading("Scores by axis")]
    parts += ['<div class="plots">', *_charts(rows), "</div>", heading("Every cell"), table(*_all(rows))]
    return page(f"Sweep {name}", parts)


def means(rows: Sequence[Row]) -> dict[tuple[str, ...], dict[str, float]]:
    """The mean of each score by the labels of all axes but ``subject`` and ``seed``."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    axes = _axes(rows)
    for row in rows:
        groups.setdefault(tuple(row.labels[axis] for axis in axes), []).append(row)
    return {labels: _mean_scores(group) for labels, group in groups.items()}


def _mean_scores(group: Sequence[Row]) -> dict[str, float]:
    names = [name for name in group[0].scores if all(name in row.scores for row in group)]
    return {name: statistics.fmean(row.scores[name] for row in group) for name in names}


def _axes(rows: Sequence[Row]) -> list[str]:
    return [axis for axis in rows[0].labels if axis not in REPEATS] if rows else []


def _scores(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.scores))


def _means(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    names, found = _scores(rows), means(rows)
    lines = [[*labels, *(_number(scores.get(name)) for name in names)] for labels, scores in found.items()]
    return [*_axes(rows), *names], lines


def _all(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    names = _scores(rows)
    header = [*(rows[0].labels if rows else ()), "steps", "trained parameters", "bytes", "seconds", *names]
    return header, [
        [*row.labels.values(), str(row.steps), f"{row.trained_parameters:,}", f"{row.bytes:,}", f"{row.seconds:.0f}",
         *(_number(row.scores.get(name)) for name in names)]
        for row in rows
    ]  # fmt: skip


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _charts(rows: Sequence[Row]) -> list[str]:
    """A plot of each score over each axis of positive numbers, with a line for each value of the other axes."""
    axes, found = _axes(rows), means(rows)
    charts = []
    for position, axis in enumerate(axes):
        if len({row.labels[axis] for row in rows}) < 2 or not all(_positive(row.labels[axis]) for row in rows):
            continue
        for name in _scores(rows):
            lines: dict[str, list[tuple[float, float]]] = {}
            for labels, scores in found.items():
                if name in scores:
                    others = ", ".join(label for i, label in enumerate(labels) if i != position)
                    lines.setdefault(others, []).append((float(labels[position]), scores[name]))
            series = {line: sorted(points) for line, points in lines.items()}
            charts.append(line_chart(name.replace("_", " "), series, axis, name, log_x=True))
    return charts


def _positive(label: str) -> bool:
    try:
        return 0 < float(label) < float("inf")
    except ValueError:
        return False
