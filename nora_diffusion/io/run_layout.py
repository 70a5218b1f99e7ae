"""What a training writes into its folder, by name; the trainer, grids and the app all read it."""

from __future__ import annotations

import re
from pathlib import Path

CONFIG, STATE, LOG, LOCK, REPORT = "config.yaml", "state.json", "log.jsonl", ".lock", "report.html"
CHECKPOINTS, MANIFEST, SAMPLES = "checkpoints", "manifest.json", "samples"
VALIDATION, CANDIDATES, MEASURED = "validation", "candidates", "validation.json"
PICTURE = re.compile(r"step-(\d+)-(\d+)\.png")


def checkpoint_steps(folder: Path) -> dict[int, Path]:
    """The folders ``step-N`` in ``folder`` by step, oldest first; others, such as a copy of one, are not of the run."""
    found = {int(m[1]): path for path in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", path.name))}
    return dict(sorted(found.items()))


def image_name(step: int, number: int) -> str:
    """The file of a sample or a measured picture."""
    return f"step-{step:06d}-{number}.png"


def step_of(picture: Path) -> int:
    """The step in a :func:`image_name`; 0 where there is none."""
    match = PICTURE.fullmatch(picture.name)
    return int(match[1]) if match else 0


def images_by_step(folder: Path) -> dict[int, list[Path]]:
    """The pictures of a folder by step, and in the order of their numbers."""
    found = [(int(m[1]), int(m[2]), path) for path in folder.glob("step-*.png") if (m := PICTURE.fullmatch(path.name))]
    pictures: dict[int, list[Path]] = {}
    for step, _, path in sorted(found):
        pictures.setdefault(step, []).append(path)
    return pictures
