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
from ..versions import versions

BASE = "base"
METRICS = ("dino", "clip_i", "clip_t", "diversity")
Table = dict[str, dict[str, dict[str, float]]]
"""``{label: {metric: {"mean", "low", "high"}}}``."""


@dataclass
class Scored:
    """One contender on one prompt of one subject: the images, one per seed, and their mean scores."""

    label: str
    subject: str
    prompt: str
    files: list[Path]
    scores: dict[str, float]


@dataclass
class Scoreboard:
    """All scores, in the same order of (subject, prompt) for every contender.

    ``real``: by subject, how similar its real images are to each other.
    """

    settings: dict[str, Any]
    labels: list[str]
    folder: Path
    scored: list[Scored] = field(default_factory=list)
    real: dict[str, dict[str, float]] = field(default_factory=dict)

    def of(self, label: str) -> list[Scored]:
        """The rows of one contender."""
        return [row for row in self.scored if row.label == label]

    @property
    def metrics(self) -> list[str]:
        """The names of the measured scores."""
        return [name for name in METRICS if name in self.scored[0].scores]


def summarize(board: Scoreboard) -> Table:
    """``{label: {metric: {"mean", "low", "high"}}}``, with 95 % bootstrap intervals over subjects and prompts."""
    draws = _draws(board)
    return {
        label: {m: _estimate([row.scores[m] for row in board.of(label)], draws) for m in board.metrics}
        for label in board.labels
    }


def compare(board: Scoreboard) -> Table:
    """The differences to the first adapter, as :func:`summarize` has the scores.

    They are paired by prompt, so that the difficulty of a prompt cancels out.
    """
    draws = _draws(board)
    first, *others = [label for label in board.labels if label != BASE] or [BASE]
    pairs = {label: list(zip(board.of(label), board.of(first), strict=True)) for label in others}
    return {
        f"{label} - {first}": {m: _estimate([a.scores[m] - b.scores[m] for a, b in rows], draws) for m in board.metrics}
        for label, rows in pairs.items()
    }


def _draws(board: Scoreboard) -> list[np.ndarray]:
    """The rows of each bootstrap resample, the same for every contender and metric."""
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(board.of(BASE)):
        groups.setdefault(row.subject, []).append(number)
    return resampled(groups)


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
        "real": {name: {k: _finite(v) for k, v in scores.items()} for name, scores in board.real.items()},
        "cells": [
            {
                "label": row.label,
                "subject": row.subject,
                "prompt": row.prompt,
                "scores": row.scores,
                "files": [str(file.relative_to(board.folder)) for file in row.files],
            }
            for row in board.scored
        ],
    }
    return json.dumps(document, indent=1)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def rows_of(table: Table, metrics: Sequence[str]) -> Iterator[list[str]]:
    """The rows of a table as text: the label, then ``mean [low, high]`` of each metric."""
    for label, values in table.items():
        yield [label, *(f"{v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for v in (values[m] for m in metrics))]
