"""Scores by contender, subject and prompt; their means and differences with bootstrap intervals."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..scoring.metrics import LEVEL, RESAMPLES, interval, resampled
from ..training.measuring.selection import LOSS, digits
from ..versions import versions
from .contenders import BASE, Contender
from .subjects import EvaluatedSubject

METRICS = ("dino", "clip_i", "clip_t", "diversity")
Table = dict[str, dict[str, dict[str, float]]]
"""``{label: {metric: {"mean", "low", "high"}}}``."""


@dataclass
class Scored:
    """One contender on one prompt of one subject: the images, one per seed, and their mean scores.

    ``kind``: the kind and level of a prompt of the list ``extended``.
    """

    label: str
    subject: str
    prompt: str
    files: list[Path]
    scores: dict[str, float]
    kind: str = ""


@dataclass
class Scoreboard:
    """All scores, in the same order of (subject, prompt) for every contender.

    ``real``: by subject, how similar its real images are to each other. ``hashes``: of the base and the judges.
    """

    settings: dict[str, Any]
    contenders: Sequence[Contender]
    subjects: Sequence[EvaluatedSubject]
    folder: Path
    hashes: dict[str, str] = field(default_factory=dict)
    scored: list[Scored] = field(default_factory=list)
    real: dict[str, dict[str, float]] = field(default_factory=dict)
    heldout: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """By contender and subject: the held-out loss on each held-out image. Empty if no subject has any."""
    noisy: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """By contender and level of weight noise: the mean held-out loss of each subject that has held-out images."""

    @property
    def labels(self) -> list[str]:
        """The labels of all contenders, the base alone first."""
        return [contender.label for contender in self.contenders]

    def of(self, label: str) -> list[Scored]:
        """The rows of one contender."""
        return [row for row in self.scored if row.label == label]

    @property
    def metrics(self) -> list[str]:
        """The names of the measured scores."""
        return [name for name in METRICS if name in self.scored[0].scores] + ([LOSS] if self.heldout else [])

    def values(self, label: str, metric: str) -> list[float]:
        """The values of one contender, by prompt or (held-out loss) by image, in the same order for all contenders."""
        if metric == LOSS:
            return [loss for losses in self.heldout[label].values() for loss in losses]
        return [row.scores[metric] for row in self.of(label)]

    def groups(self, metric: str) -> dict[str, list[int]]:
        """The indices of the values of each subject."""
        subjects = [row.subject for row in self.of(BASE)]
        if metric == LOSS:
            subjects = [name for name, losses in self.heldout[BASE].items() for _ in losses]
        found: dict[str, list[int]] = {}
        for number, subject in enumerate(subjects):
            found.setdefault(subject, []).append(number)
        return found


def summarize(board: Scoreboard) -> Table:
    """``{label: {metric: {"mean", "low", "high"}}}``, with 95 % bootstrap intervals over subjects and prompts."""
    draws = _draws(board)
    return {label: {m: _estimate(board.values(label, m), draws[m]) for m in board.metrics} for label in board.labels}


def compare(board: Scoreboard) -> Table:
    """The differences to the first adapter, as :func:`summarize` has the scores.

    They are paired by prompt or held-out image, so that its difficulty cancels out.
    """
    draws = _draws(board)
    first, *others = [label for label in board.labels if label != BASE] or [BASE]

    def gaps(label: str, metric: str) -> list[float]:
        pairs = zip(board.values(label, metric), board.values(first, metric), strict=True)
        return [one - other for one, other in pairs]

    return {f"{label} - {first}": {m: _estimate(gaps(label, m), draws[m]) for m in board.metrics} for label in others}


def _draws(board: Scoreboard) -> dict[str, list[np.ndarray]]:
    """The values of each bootstrap resample by metric, the same for every contender."""
    by_prompt = resampled(board.groups(METRICS[0]))
    return {m: resampled(board.groups(m)) if m == LOSS else by_prompt for m in board.metrics}


def _estimate(values: list[float], draws: Sequence[np.ndarray]) -> dict[str, float]:
    low, high = interval(values, draws)
    return {"mean": statistics.fmean(values), "low": low, "high": high}


def as_json(board: Scoreboard) -> str:
    """Settings, scores and image files (relative to the board's folder) as JSON."""
    document = {
        **board.settings,
        "level": LEVEL,
        "resamples": RESAMPLES,
        "versions": versions(),
        "table": summarize(board),
        "differences": compare(board),
        "heldout_loss": board.heldout,
        "heldout_loss_under_noise": board.noisy,
        "real": {name: {k: _finite(v) for k, v in scores.items()} for name, scores in board.real.items()},
        "cells": [
            {
                "label": row.label,
                "subject": row.subject,
                "prompt": row.prompt,
                "kind": row.kind,
                "scores": row.scores,
                "files": [str(file.relative_to(board.folder)) for file in row.files],
            }
            for row in board.scored
        ],
    }
    return json.dumps(document, indent=1)


def noise_rows(board: Scoreboard) -> list[list[str]]:
    """The held-out loss over levels of weight noise as text: a head, then a row for each contender."""
    levels = [f"{level:g}" for level in board.settings["weight_noise"]]
    rows = [[label, *(f"{statistics.fmean(own[level]):.4f}" for level in levels)] for label, own in board.noisy.items()]
    return [["held-out loss at noise", *levels], *rows] if rows else []


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def rows_of(table: Table, metrics: Sequence[str]) -> Iterator[list[str]]:
    """The rows of a table as text: the label, then ``mean [low, high]`` of each metric."""

    def text(metric: str, value: dict[str, float]) -> str:
        mean, low, high = (f"{value[key]:.{digits(metric)}f}" for key in ("mean", "low", "high"))
        return f"{mean} [{low}, {high}]"

    for label, values in table.items():
        yield [label, *(text(metric, values[metric]) for metric in metrics)]
