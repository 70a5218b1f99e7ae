"""Grids: the same image under changing settings. Resumable; each cell equals the image of a single run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..data.captions import without_trigger
from ..errors import UserError
from ..formats.adapter_file import given_name
from ..generation.image_settings import adapter_settings, read_settings, save_image
from ..generation.sampling import OnStep, check_lengths, describe_image, sample_images
from ..io.images import load_image
from ..loaders import delete_adapter, load_adapter, set_adapters
from ..pipelines.base import base_id
from ..pipelines.components import denoiser, projections
from ..pipelines.fingerprints import fingerprint
from ..pipelines.precision import dtype_name
from ..scoring.judges import Judge, image_features, text_features
from ..scoring.metrics import agreement, likeness
from ..versions import versions
from .axes import Cell
from .settings import GridConfig
from .sheet import MadeCell, write_grid

NAME = "grid_cell"


class Grid:
    """A grid on one pipeline: :meth:`make` the missing cells, then :meth:`finish`.

    ``pipe``: an open pipeline to use instead of ``config.source``; its active adapters are deactivated.
    """

    def __init__(self, config: GridConfig, pipe: Any = None) -> None:
        self.config = config
        self.folder = Path(config.out).expanduser()
        self.cells = config.cells()
        self.adapters = config.adapters()
        self.pipe = config.source.open() if pipe is None else pipe
        self._base = base_description(self.pipe)
        self.files = {position: self._file(cell) for position, cell in self.cells}

    def _file(self, cell: Cell) -> Path:
        """The file of a cell, named by the hash of everything its pixels depend on."""
        path = cell.path
        values = asdict(cell.sampling) | {
            "prompt": cell.prompt,
            "seed": cell.seed,
            "adapter": self.adapters[path].sha256 if path else None,
            "weight": float(cell.weight) if path else None,
            "method": None,
            "step": None,
            "base": self._base,
        }
        return self.folder / "cells" / f"{hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()}.png"

    def missing(self) -> list[Cell]:
        """The cells without their image, one per file, grouped by adapter."""
        missing: dict[Path, Cell] = {}
        for position, cell in self.cells:
            if not _holds(self.files[position], cell):
                missing.setdefault(self.files[position], cell)
        return sorted(missing.values(), key=lambda cell: str(cell.path or ""))

    def make(self, on_step: OnStep | None = None, check: Callable[[], None] | None = None) -> Iterator[tuple[int, int]]:
        """Generate the missing cells; yields ``(done, total)`` before the first and after each of them.

        ``on_step`` and ``check`` are those of :func:`sample_images`.

        One adapter at a time is loaded; it is deleted at the end, even after an error.
        """
        missing = self.missing()
        total = len(set(self.files.values()))
        done = total - len(missing)
        yield done, total
        set_adapters(self.pipe, [])
        loaded: Path | None = None
        try:
            for cell in missing:
                if cell.path != loaded:
                    if loaded is not None:
                        delete_adapter(self.pipe, NAME)
                        loaded = None
                    if cell.path is not None:
                        load_adapter(self.pipe, cell.path, NAME)
                        loaded = cell.path
                if loaded is not None:
                    set_adapters(self.pipe, [NAME], [cell.weight])
                self._sample(cell, on_step, check)
                done += 1
                yield done, total
        finally:
            if loaded is not None:
                delete_adapter(self.pipe, NAME)

    def _sample(self, cell: Cell, on_step: OnStep | None, check: Callable[[], None] | None) -> None:
        check_lengths(self.pipe, [cell.prompt, cell.sampling.negative_prompt])
        image = sample_images(self.pipe, [cell.prompt], [cell.seed], cell.sampling, on_step, check)[0]
        adapters = []
        if (path := cell.path) is not None:
            info = self.adapters[path]
            shown = Path(info.path).name if self.config.private else info.path
            adapters = [adapter_settings(info, shown, given_name(info.path), float(cell.weight))]
        settings = describe_image(self.pipe, image, cell.prompt, cell.seed, cell.sampling, adapters)
        save_image(image, self._file(cell), settings)

    def finish(self, judge: Judge | None = None, references: Sequence[Image.Image] = ()) -> list[MadeCell]:
        """Score the cells, write ``grid.png`` and ``grid.json``; returns the cells, row by row."""
        cells = [MadeCell(at, file, asdict(read_settings(file))) for at, file in self.files.items()]
        images = [load_image(cell.file) for cell in cells]
        if judge is not None:
            triggers = [info.trigger for info in self.adapters.values()]
            targets = image_features(judge, references) if references else None
            for cell, image in zip(cells, images, strict=True):
                cell.scores = score(judge, image, cell.settings["prompt"], triggers, targets)
        dtype = dtype_name(denoiser(self.pipe).dtype)
        write_grid(self.folder, self.config, cells, images, base=self._base["name"], dtype=dtype, versions=versions())
        return cells


def run_grid(config: GridConfig, judge: Judge | None = None, references: Sequence[Image.Image] = ()) -> Path:
    """Generate, score and write a whole grid; returns its folder."""
    grid = Grid(config)
    for _ in grid.make():
        pass
    grid.finish(judge, references)
    return grid.folder


def base_description(pipe: Any) -> dict[str, Any]:
    """What an image depends on besides its cell: the base's name, weights and sampler, the precision and versions."""
    model = denoiser(pipe)
    fingerprints = [round(fingerprint(layer, path), 9) for path, layer in list(projections(model).items())[:8]]
    sampler = json.dumps(dict(pipe.scheduler.config), sort_keys=True, default=str)
    return {
        "name": base_id(pipe),
        "fingerprint": fingerprints,
        "sampler": f"{type(pipe.scheduler).__name__} {hashlib.sha256(sampler.encode()).hexdigest()}",
        "dtype": str(model.dtype),
        "device": model.device.type,
        "versions": versions(),
    }


def score(
    judge: Judge, image: Image.Image, prompt: str, triggers: Sequence[str], references: Tensor | None
) -> dict[str, float]:
    """``prompt``: CLIP-T without the triggers; ``subject``: CLIP-I to the features ``references``."""
    for trigger in triggers:
        prompt = without_trigger(prompt, trigger)
    features = image_features(judge, [image])
    scores = {"prompt": agreement(features, text_features(judge, [prompt]))[0]}
    if references is not None:
        scores["subject"] = likeness(features, references)[0]
    return {name: round(value, 4) for name, value in scores.items()}


def _holds(file: Path, cell: Cell) -> bool:
    """Whether a file is a readable image of a cell, and not one that was renamed."""
    try:
        found = read_settings(file)
        with Image.open(file) as image:
            image.load()
    except (UserError, OSError, SyntaxError, ValueError):
        return False
    return (found.prompt, found.seed, found.steps) == (cell.prompt, cell.seed, cell.sampling.steps)
