"""What the Generate tab shows while it works."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..layout.cards import line
from ..runs import Progress
from ..state import App


def status(progress: Progress, idle: bool = False) -> str:
    """One line: the place in the queue, how far the work is, or how it ended."""
    if idle:
        return line("Write a prompt and press Generate, or Ctrl+Enter.")
    if progress.state == "failed":
        return line(progress.message, bad=True)
    if progress.state == "waiting":
        return line(_waiting(progress))
    if progress.state == "working":
        if not progress.steps:
            return line("Loading …")
        step = min(progress.step, progress.steps)  # PNDM takes its first step twice
        done = ((progress.picture - 1) + step / progress.steps) / max(1, progress.pictures)
        text = f"Picture {progress.picture} of {progress.pictures}, step {step} of {progress.steps}"
        return line(text) + f'<div class="bar"><span style="width:{100 * done:.0f}%"></span></div>'
    made = len(progress.files)
    pictures = f"{made} picture{'' if made == 1 else 's'} in {progress.seconds:.1f} s"
    return line(f"Interrupted after {pictures}." if progress.state == "stopped" else f"{pictures}.")


def _waiting(progress: Progress) -> str:
    if not progress.busy_with:
        return "Starting …"
    place = f"You are number {progress.ahead} in the queue" if progress.ahead else "You are next"
    return f"{place}; now running: {progress.busy_with}."


def live(progress: Progress) -> str:
    """The picture that is being made, roughly."""
    if not progress.preview:
        return ""
    return f'<img class="preview" alt="Preview of the picture that is being made" src="{escape(progress.preview)}">'


def gallery_items(app: App, files: Sequence[Path]) -> list[tuple[str, str]]:
    """Newest first, with their seeds. Copies are handed out by path, so that the settings in the PNGs survive."""
    return [(app.hand_out(file), f"seed {file.stem.partition('-')[2]}") for file in reversed(files)]
