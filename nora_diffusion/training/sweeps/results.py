"""The results of a sweep: a results file (:mod:`nora_diffusion.results`), and a report with tables and plots."""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...io.files import write_atomic
from ...io.run_layout import MEASURED
from ...io.untrusted import parse_json
from ...reports.plots import line_chart
from ...reports.webpage import heading, page, table
from ...results import files, schema
from ...results.machine import this_machine, today, without_folders
from ...versions import versions
from ..measuring.selection import DIRECTIONS
from ..planning.rundir import RunFolder, read_state
from ..record import RunRecord, read_record
from ..settings.config import TrainConfig, settings_by_name, tagged
from .cells import Cell

log = logging.getLogger(__name__)

RESULTS, REPORT = "results.json", "report.html"
REPEATS = ("seed", "subject")
"""Axes over which a table averages."""
TASK = "photos"
TRAINING_LOSS = "training_loss"
JUDGED = ("judge", "dino", "validation_prompts", "sample_steps", "sample_guidance", "validation_split")
"""Settings that decide what a run's validation measures."""


@dataclass(frozen=True)
class Row:
    """A finished cell. ``scores``: the training loss, and what the run's validation measured at the saved step.

    ``judges``: the hashes of those of the validation.
    """

    labels: dict[str, str]
    record: RunRecord
    scores: dict[str, float]
    judges: dict[str, str]

    @property
    def method(self) -> str:
        """The labels on all axes that a results file has no field for; the method first, unless an axis names it."""
        own = {axis: label for axis, label in self.labels.items() if axis not in (*REPEATS, "learning_rate")}
        named = [label for axis, label in own.items() if axis == "method" or axis not in settings_by_name()]
        others = [f"{axis}={label}" for axis, label in own.items() if label not in named]
        return " ".join([*(named or [self.record.info.method]), *others])

    @property
    def subject(self) -> str:
        """The label of the subject, else the name of its folder."""
        folder = (self.record.config and self.record.config.instance_data_dir) or "subject"
        return self.labels.get("subject") or Path(folder).name


def read_row(cell: Cell, out: Path) -> Row | None:
    """The row of a cell; ``None`` if it is not finished, or its folder holds another run."""
    folder = RunFolder(out / cell.name)
    state = read_state(folder.path)
    if state.get("status") != "done" or not folder.adapter.exists():
        return None
    record = read_record(folder.adapter)
    if record.config is not None and not _is_of(cell, record.config):
        log.warning("%s is left out: its run has other settings than its name says, so it was renamed", folder.path)
        return None
    loss = state.get("loss")
    scores = {TRAINING_LOSS: loss} if isinstance(loss, float) and abs(loss) <= files.LARGEST else {}
    measured, judges = _validation(folder.path, record.info.step)
    return Row(dict(cell.labels), record, scores | measured, judges)


def _is_of(cell: Cell, config: TrainConfig) -> bool:
    """Whether a run has the settings of a cell, but for those that may change when it resumes."""
    own, free = TrainConfig.from_mapping(cell.settings), {*tagged("free"), "trigger"}
    return all(getattr(own, name) == getattr(config, name) for name in cell.settings if name not in free)


def _validation(folder: Path, step: int) -> tuple[dict[str, float], dict[str, str]]:
    """The scores that the run's validation measured at ``step``, and the hashes of its judges."""
    try:
        stored = parse_json((folder / MEASURED).read_bytes())
        scores = next(point["scores"] for point in stored["points"] if point["step"] == step)
        judges = {name: value for name, value in stored.get("judges", {}).items() if schema.HASH.fullmatch(value)}
        return {str(name): float(value) for name, value in scores.items() if name in DIRECTIONS}, judges
    except (OSError, ValueError, KeyError, TypeError, StopIteration, AttributeError):
        return {}, {}


def write_results(name: str, cells: Sequence[Cell], out: Path, command: str) -> list[Row]:
    """Write ``results.json`` and ``report.html`` of the cells that are finished; return their rows.

    Cells on other bases, or of another precision, validation or judge, cannot be compared with the first ones: they get
    ``results-2.json`` and so on.
    """
    rows = [row for cell in cells if (row := read_row(cell, out)) is not None]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row.record.info.base, _protocol(row), row.judges]), []).append(row)
    for number, group in enumerate(groups.values(), start=1):
        file = out / (RESULTS if number == 1 else f"results-{number}.json")
        files.write_results(_results(name, group, command), file)
    write_atomic(out / REPORT, report(name, rows))
    return rows


def _results(name: str, rows: Sequence[Row], command: str) -> schema.Results:
    names = list(dict.fromkeys(score for row in rows for score in row.scores))
    directions = DIRECTIONS | {TRAINING_LOSS: -1}
    data: dict[str, dict[str, schema.Images]] = {}
    for row in rows:
        photos = row.record.photos
        data.setdefault(row.subject, {} if photos is None else {"training": photos})
    return schema.Results(
        name=name, command=command, date=today(), protocol=_protocol(rows[0]),
        base=schema.Base(without_folders(rows[0].record.info.base), _fingerprint(rows)),
        judges=rows[0].judges, data={TASK: data},
        methods={row.method: row.record.settings for row in rows},
        scores={score: "higher" if directions[score] > 0 else "lower" for score in names},
        machine=this_machine("clock"), versions=versions(), rows=[_row(row) for row in rows],
    )  # fmt: skip


def _row(row: Row) -> schema.Row:
    info = row.record.info
    return schema.Row(
        row.method, TASK, row.subject, info.seed or 0, row.record.rate, row.record.steps, info.trained_parameters,
        info.bytes, row.record.seconds, row.scores,
    )  # fmt: skip


def _protocol(row: Row) -> dict[str, str | bool | int | float]:
    """How a cell was trained and validated."""
    config = row.record.config
    judged = json.dumps({key: getattr(config, key, None) for key in JUDGED}, sort_keys=True)
    precision = (config and config.mixed_precision) or "unknown"
    return {"name": "sweep", "precision": precision, "validation": hashlib.sha256(judged.encode()).hexdigest()[:16]}


def _fingerprint(rows: Sequence[Row]) -> str:
    """A hash of the base's weights in all layers that the cells adapt."""
    marks = {str(key): f"{value:.4g}" for row in rows for key, value in row.record.info.fingerprints.items()}
    return schema.digest(marks)


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
        [*row.labels.values(), str(row.record.info.step), f"{row.record.info.trained_parameters:,}",
         f"{row.record.info.bytes:,}", f"{row.record.seconds:.0f}", *(_number(row.scores.get(name)) for name in names)]
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
