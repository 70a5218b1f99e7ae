"""The report of an evaluation: a JSON file and a self-contained HTML page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from ..io.files import write_atomic
from ..io.images import load_image
from ..reports import webpage
from ..training.measuring.selection import LOSS, digits
from .scoreboard import Scoreboard, Table, as_json, compare, rows_of, summarize

MAX_SUBJECTS, MAX_PROMPTS = 6, 6
NAMES = {
    "dino": "DINO ↑",
    "clip_i": "CLIP-I ↑",
    "clip_t": "CLIP-T ↑",
    "diversity": "diversity ↑",
    LOSS: "held-out loss ↓",
}


def write_reports(board: Scoreboard) -> Path:
    """Write ``evaluation.json`` and ``report.html``; returns the path of the page."""
    write_atomic(board.folder / "evaluation.json", as_json(board))
    return write_atomic(board.folder / "report.html", page(board))


def page(board: Scoreboard) -> str:
    """The report as one HTML page."""
    settings, table, differences = board.settings, summarize(board), compare(board)
    parts = [
        webpage.paragraph(_summary(board)),
        _table(board, table, "Mean over prompts, with a 95 % bootstrap interval over subjects and prompts."),
        webpage.paragraph(_ceiling(board)),
        webpage.paragraph(
            f"DINO ({settings['dino'] or 'not measured: no --dino'}) and CLIP-I ({settings['judge']}): mean cosine to "
            "the real images. CLIP-T: cosine to the prompt without the trigger. Diversity: mean of 1 - cosine over "
            "pairs of images of one prompt. Held-out loss: mean squared error of the denoiser on images that were not "
            "trained on. Scores of different judges cannot be compared."
        ),
    ]
    if differences:
        caption = "Differences to the first adapter, prompt by prompt and image by image."
        parts += [webpage.heading("Differences"), _table(board, differences, caption)]
    subjects = list(dict.fromkeys(row.subject for row in board.scored))
    if len(subjects) > 1:
        parts += [webpage.heading("By subject"), _by_subject(board, subjects)]
    for name in subjects[:MAX_SUBJECTS]:
        parts += [webpage.heading(name), _images(board, name)]
    return webpage.page("Evaluation", parts)


def _summary(board: Scoreboard) -> str:
    settings = board.settings
    prompts = len(board.of(board.labels[0]))
    return (
        f"{len(board.labels) - 1} adapters and the base alone, {len(board.real)} subjects, {prompts} prompts in total, "
        f"{settings['seeds']} seeds each, {settings['steps']} steps on {settings['base']}."
    )


def _ceiling(board: Scoreboard) -> str:
    names = [name for name in ("dino", "clip_i") if name in next(iter(board.real.values()))]
    means = {name: statistics.fmean(scores[name] for scores in board.real.values()) for name in names}
    scores = ", ".join(f"{NAMES[name].split()[0]} {value:.3f}" for name, value in means.items() if math.isfinite(value))
    return f"Real images of a subject compared with each other: {scores or 'too few'} (an upper limit)."


def _table(board: Scoreboard, table: Table, caption: str) -> str:
    return webpage.table(["", *(NAMES[m] for m in board.metrics)], list(rows_of(table, board.metrics)), caption)


def _by_subject(board: Scoreboard, subjects: list[str]) -> str:
    groups = {metric: board.groups(metric) for metric in board.metrics}

    def mean(label: str, metric: str, rows: Sequence[int]) -> str:
        values = board.values(label, metric)
        return f"{statistics.fmean(values[i] for i in rows):.{digits(metric)}f}" if rows else ""

    rows = [
        [f"{name}, {label}", *(mean(label, metric, groups[metric].get(name, ())) for metric in board.metrics)]
        for name in subjects
        for label in board.labels
    ]
    return webpage.table(["", *(NAMES[m] for m in board.metrics)], rows)


def _images(board: Scoreboard, subject: str) -> str:
    rows = {label: [row for row in board.of(label) if row.subject == subject][:MAX_PROMPTS] for label in board.labels}
    header = ["", *(row.prompt for row in rows[board.labels[0]])]
    body = [
        [label, *(webpage.image_tag(load_image(row.files[0]), f"{label}: {row.prompt}") for row in found)]
        for label, found in rows.items()
    ]
    return webpage.table(header, body, "The first seed of the first prompts.")
