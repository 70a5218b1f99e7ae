"""What a training writes into its folder, by name; the trainer, grids and the app all read it."""

from __future__ import annotations

import re
from pathlib import Path

CONFIG, STATE, LOG, LOCK, REPORT = "config.yaml", "state.json", "log.jsonl", ".lock", "report.html"
CHECKPOINTS, MANIFEST, SAMPLES = "checkpoints", "manifest.json", "samples"
VALIDATION, CANDIDATES, MEASURED = "validation", "candidates", "validation.json"


def checkpoint_steps(folder: Path) -> dict[int, Path]:
    """The folders ``step-N`` in ``folder`` by step, oldest first; others, such as a copy of one, are not of the run."""
    found = {int(m[1]): path for path in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", path.name))}
    return dict(sorted(found.items()))
