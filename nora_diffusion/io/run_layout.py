"""File and folder names inside a run folder, shared by the trainer, the evaluation grids and the app."""

from __future__ import annotations

import re
from pathlib import Path

CONFIG, STATE, LOG, LOCK, REPORT = "config.yaml", "state.json", "log.jsonl", ".lock", "report.html"
CHECKPOINTS, MANIFEST, SAMPLES = "checkpoints", "manifest.json", "samples"
VALIDATION, CANDIDATES, MEASURED = "validation", "candidates", "validation.json"
IMAGE = re.compile(r"step-(\d+)-(\d+)\.png")


def checkpoint_steps(folder: Path) -> dict[int, Path]:
    """The ``step-N`` folders in ``folder`` by step, ascending; any other name (such as a copy) is skipped."""
    found = {int(m[1]): path for path in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", path.name))}
    return dict(sorted(found.items()))


def image_name(step: int, number: int) -> str:
    """File name of a sample or validation image."""
    return f"step-{step:06d}-{number}.png"


def step_of(image: Path) -> int:
    """The step in a file name made by :func:`image_name`; 0 for any other name."""
    match = IMAGE.fullmatch(image.name)
    return int(match[1]) if match else 0


def images_by_step(folder: Path) -> dict[int, list[Path]]:
    """The images of a folder by step, ascending, each step's in the order of their numbers."""
    found = [(int(m[1]), int(m[2]), path) for path in folder.glob("step-*.png") if (m := IMAGE.fullmatch(path.name))]
    images: dict[int, list[Path]] = {}
    for step, _, path in sorted(found):
        images.setdefault(step, []).append(path)
    return images
