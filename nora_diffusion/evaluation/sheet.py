"""The finished cells of a grid as one labeled image and one report, wherever they were made. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..io.files import write_atomic
from ..io.images import png
from ..reports.sheets import contact_sheet
from .settings import GridConfig

LABEL_LENGTH = 28


@dataclass
class MadeCell:
    """A finished cell: its position ``(x, y, z)``, file, settings and scores."""

    position: tuple[int, int, int]
    file: Path
    settings: dict[str, Any]
    scores: dict[str, float] = field(default_factory=dict)


def write_grid(
    folder: Path, config: GridConfig, cells: Sequence[MadeCell], images: Sequence[Image.Image], **about: Any
) -> None:
    """Write ``grid.png`` and ``grid.json``. ``about``: what the report says about all cells."""
    write_atomic(folder / "grid.png", png(_sheet(config, cells, images)))
    write_atomic(folder / "grid.json", json.dumps(_report(folder, config, cells, about), indent=1))


def _sheet(config: GridConfig, cells: Sequence[MadeCell], images: Sequence[Image.Image]) -> Image.Image:
    x, y, z = config.x, config.y, config.z
    columns = len(x.labels)
    pairs = [
        (image, f"{_short(x.title(cell.position[0]))} {_scores_text(cell.scores)}")
        for cell, image in zip(cells, images, strict=True)
    ]
    titles = [
        ", ".join(filter(None, (z.title(k), y.title(j)))) for k in range(len(z.labels)) for j in range(len(y.labels))
    ]
    rows = [pairs[start : start + columns] for start in range(0, len(pairs), columns)]
    return contact_sheet(rows, titles, side=192 if images[0].width < 192 else 256)


def _report(folder: Path, config: GridConfig, cells: Sequence[MadeCell], about: dict[str, Any]) -> dict[str, Any]:
    axes = {key: getattr(config, key) for key in ("x", "y", "z")}
    return {
        "axes": {key: {"name": a.name, "labels": a.labels} for key, a in axes.items() if a.name},
        **about,
        "cells": [
            {
                **dict(zip(("x", "y", "z"), cell.position, strict=True)),
                "file": str(cell.file.relative_to(folder)),
                "settings": cell.settings,
                "scores": cell.scores,
            }
            for cell in cells
        ],
    }


def _scores_text(scores: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.3f}" for name, value in scores.items())


def _short(text: str) -> str:
    return text if len(text) <= LABEL_LENGTH else text[: LABEL_LENGTH - 1] + "…"
