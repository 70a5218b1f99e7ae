"""The report of an evaluation: a JSON file and a self-contained HTML page."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from ..io.files import write_atomic
from ..io.images import load_image
from ..reports import webpage
from ..training.measuring.selection import LOSS, digits
from .scoreboard import Scoreboard, Table, as_json, compare, rows_of, summarize

MAX_SUBJECTS, MAX_PROMPTS, MAX_SEEDS = 6, 6, 4
NAMES = {
    "dino": "DINO ↑",
    "clip_i": "CLIP-I ↑",
    "clip_t": "CLIP-T ↑",
    "diversity": "diversity ↑",
    LOSS: "held-out loss ↓",
}


def write_reports(board: Scoreboard) -> Path:
    """Write ``evaluation.json``, ``report.html`` and a page for each subject; returns the path of the first page."""
    write_atomic(board.folder / "evaluation.json", as_json(board))
    for name, file in subject_files(board).items():
        write_atomic(board.folder / file, subject_page(board, name))
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
    if any(row.kind for row in board.scored):
        parts += [webpage.heading("By kind of prompt"), _by_kind(board)]
    files = subject_files(board)
    parts += [webpage.heading("By subject"), webpage.links(files), _by_subject(board, [*files])]
    for name in [*files][:MAX_SUBJECTS]:
        parts += [webpage.heading(name), _images(board, name)]
    return webpage.page("Evaluation", parts)


def subject_files(board: Scoreboard) -> dict[str, str]:
    """The page of each subject, below the board's folder. Their names hold no character that an address escapes."""
    names = dict.fromkeys(row.subject for row in board.scored)
    return {n: f"subjects/{i:03d}-{re.sub('[^0-9A-Za-z_-]', '-', n)[:60]}.html" for i, n in enumerate(names, start=1)}


def subject_page(board: Scoreboard, name: str) -> str:
    """One subject: its real images, its scores, and all prompts with the images and scores of each contender."""
    subject = next(found for found in board.subjects if found.name == name)
    references = [webpage.image_tag(image, f"{name}, real image", 96) for image in subject.references]
    parts = [
        webpage.heading("Real images"),
        webpage.table(["", *map(str, range(1, len(references) + 1))], [["", *references]]),
        webpage.heading("Scores"),
        _by_subject(board, [name]),
        webpage.heading("Images by prompt"),
    ]
    rows = {label: [row for row in board.of(label) if row.subject == name] for label in board.labels}
    body = []
    for number, first in enumerate(rows[board.labels[0]]):
        cells = [first.prompt + (f" ({first.kind})" if first.kind else "")]
        for label in board.labels:
            row = rows[label][number]
            images = [load_image(file) for file in row.files[:MAX_SEEDS]]
            scores = " ".join(f"{NAMES[key].split()[0]} {value:.3f}" for key, value in row.scores.items())
            cells.append(webpage.images_tag(images, f"{label}: {row.prompt}", scores, 96))
        body.append(cells)
    parts.append(webpage.table(["", *board.labels], body, f"The first {MAX_SEEDS} seeds."))
    return webpage.page(name, parts)


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


def _by_kind(board: Scoreboard) -> str:
    """Mean scores by kind, by level and by both."""
    names = [name for name in board.metrics if name != LOSS]
    kinds = dict.fromkeys(row.kind for row in board.scored if row.kind)
    groups = [*dict.fromkeys(part for kind in kinds for part in kind.split(", ")), *kinds]

    def mean(label: str, group: str, metric: str) -> str:
        found = [row for row in board.of(label) if group == row.kind or group in row.kind.split(", ")]
        return f"{statistics.fmean(row.scores[metric] for row in found):.{digits(metric)}f}"

    rows = [
        [f"{group}: {label}", *(mean(label, group, metric) for metric in names)]
        for group in groups
        for label in board.labels
    ]
    return webpage.table(["", *(NAMES[m] for m in names)], rows)


def _images(board: Scoreboard, subject: str) -> str:
    rows = {label: [row for row in board.of(label) if row.subject == subject][:MAX_PROMPTS] for label in board.labels}
    header = ["", *(row.prompt for row in rows[board.labels[0]])]
    body = [
        [label, *(webpage.image_tag(load_image(row.files[0]), f"{label}: {row.prompt}") for row in found)]
        for label, found in rows.items()
    ]
    return webpage.table(header, body, "The first seed of the first prompts.")
