"""Status, preview and gallery of a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..layout.cards import line
from ..runs import Progress
from ..state import App

SURE_SECONDS = 2.0
"""So long it is not known how fast the base is."""


def status(progress: Progress, idle: bool = False) -> str:
    """One line: the position in the queue, the progress, or the result."""
    if idle:
        return line("Enter a prompt, then press Generate or Ctrl+Enter.")
    if progress.state == "failed":
        return line(progress.message, bad=True)
    if progress.state == "waiting":
        return line(_waiting(progress))
    if progress.state == "working":
        if not progress.steps:
            return line("Loading …")
        step = min(progress.step, progress.steps)  # PNDM makes one step more
        done = progress.share or ((progress.image - 1) + step / progress.steps) / max(1, progress.images)
        text = f"Image {progress.image} of {progress.images}, step {step} of {progress.steps}"
        return (
            line(text + _left(progress, done)) + f'<div class="bar"><span style="width:{100 * done:.0f}%"></span></div>'
        )
    made = len(progress.files)
    images = f"{made} image{'' if made == 1 else 's'} in {progress.seconds:.1f} s"
    return line(f"Interrupted after {images}." if progress.state == "stopped" else f"{images}.")


def _left(progress: Progress, done: float) -> str:
    """How long the rest will take, as long as what is done took; not told in the first seconds, and near the end."""
    spent = time.monotonic() - progress.begun
    if spent < SURE_SECONDS or not 0 < done < 1 or (left := spent * (1 - done) / done) < 1:
        return ""
    return f", about {left:.0f} s left" if left < 90 else f", about {left / 60:.0f} minutes left"


def _waiting(progress: Progress) -> str:
    if not progress.busy_with:
        return "Starting …"
    position = f"You are number {progress.ahead} in the queue" if progress.ahead else "You are next"
    return f"{position}; now running: {progress.busy_with}."


def preview_image(progress: Progress) -> str:
    """The preview of the current image, as HTML."""
    if not progress.preview:
        return ""
    return f'<img class="preview" alt="Preview of the current image" src="{escape(progress.preview)}">'


def gallery_items(app: App, files: Sequence[Path], captions: Sequence[str] = ()) -> list[tuple[str, str]]:
    """The images in the order of the request, with their seeds or ``captions``.

    Passed as file paths, so that downloads keep the settings in the PNG.
    """
    texts = captions or [f"seed {file.stem.partition('-')[2]}" for file in files]
    return [(app.hand_out(file), text) for file, text in zip(files, texts, strict=False)]
