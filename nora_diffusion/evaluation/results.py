"""An evaluation as a results file: a row for each adapter and subject, with means over prompts and seeds."""

from __future__ import annotations

import hashlib
import statistics
from typing import Any

from ..io.files import real_path
from ..results import schema
from ..results.machine import this_machine, today, without_folders
from ..training.measuring.selection import DIRECTIONS, LOSS
from ..training.record import RunRecord, read_record
from ..versions import versions
from .contenders import Contender
from .scoreboard import METRICS, Scoreboard

TASK = "photos"
PROTOCOL = ("seeds", "dtype", "steps", "guidance", "width", "height", "negative_prompt")
"""The settings that decide which images are made."""


def as_results(board: Scoreboard, command: str) -> schema.Results:
    """The results of an evaluation. What follows ``@`` in a label is no part of the method's name.

    So adapters of one method at several rates or seeds, ``nora@1e-3`` and ``nora@2e-3``, are rows of one method.
    """
    subjects = [subject.name for subject in board.subjects]
    records = {(c.label, name): _record(c, name) for c in board.contenders for name in subjects}
    names = _method_names(board, records)
    methods: dict[str, dict[str, Any]] = {}
    for contender in board.contenders:
        record = records[contender.label, subjects[0]]
        weight = {} if contender.weight == 1 else {"weight": contender.weight}
        methods.setdefault(names[contender.label], (record.settings if record else {}) | weight)
    return schema.Results(
        name=real_path(board.folder).name, command=command, date=today(), protocol=_protocol(board),
        base=schema.Base(without_folders(board.settings["base"]), board.hashes["base"]),
        judges={name: value for name, value in board.hashes.items() if name != "base"},
        data={TASK: {name: _images(board, name, records) for name in subjects}}, methods=methods,
        scores={name: "higher" if DIRECTIONS[name] > 0 else "lower" for name in board.metrics},
        machine=this_machine("clock"), versions=versions(),
        rows=[_row(board, c.label, names[c.label], name, records[c.label, name])
              for c in board.contenders for name in subjects],
    )  # fmt: skip


def _record(contender: Contender, subject: str) -> RunRecord | None:
    path = contender.adapter(subject)
    return None if path is None else read_record(path)


def _method_names(board: Scoreboard, records: dict[tuple[str, str], RunRecord | None]) -> dict[str, str]:
    """The label up to its ``@``, if the rates or seeds behind it are known and differ."""
    short = {label: label.partition("@")[0] or label for label in board.labels}
    subject = board.subjects[0].name
    rows = [_row(board, label, short[label], subject, records[label, subject]).identity for label in board.labels]
    return short if len(set(rows)) == len(rows) else {label: label for label in board.labels}


def _protocol(board: Scoreboard) -> dict[str, str | bool | int | float]:
    templates = "\n".join(template for subject in board.subjects for template in (subject.name, *subject.templates))
    values = {name: board.settings[name] for name in PROTOCOL if board.settings.get(name) is not None}
    prompts = hashlib.sha256(templates.encode()).hexdigest()[:16]
    return {"name": "DreamBooth protocol", "prompts": prompts, **values}


def _images(
    board: Scoreboard, subject: str, records: dict[tuple[str, str], RunRecord | None]
) -> dict[str, schema.Images]:
    """What images are compared with, and what was trained on, if that is known and the same for all adapters."""
    own = next(found for found in board.subjects if found.name == subject)
    images = {"scoring": schema.Images.of([source.sha256 for source in own.references.sources])}
    photos = {record.photos for label in board.labels if (record := records[label, subject]) is not None}
    trained = photos.pop() if len(photos) == 1 else None
    return images | ({} if trained is None else {"training": trained})


def _row(board: Scoreboard, label: str, method: str, subject: str, record: RunRecord | None) -> schema.Row:
    found = [row.scores for row in board.of(label) if row.subject == subject]
    scores = {name: statistics.fmean(own[name] for own in found) for name in METRICS if name in found[0]}
    if losses := board.heldout.get(label, {}).get(subject):
        scores[LOSS] = statistics.fmean(losses)
    if record is None:
        return schema.Row(method, TASK, subject, 0, None, 0, 0, 0, 0.0, scores)
    info = record.info
    return schema.Row(
        method, TASK, subject, info.seed or 0, record.rate, record.steps, info.trained_parameters, info.bytes,
        record.seconds, scores,
    )  # fmt: skip
