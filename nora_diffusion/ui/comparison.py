"""What the Compare tab makes: a grid over adapters of the library, on the app's one pipeline."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation.axes import AXES as AXES
from ..evaluation.axes import NONE, Axis, Cell, parse_axis
from ..evaluation.grid import NO_AXIS, Grid, GridConfig, MadeCell
from ..formats.adapter_file import FILE_NAME
from ..io.run_layout import CHECKPOINTS, checkpoint_steps
from .entries import Entry
from .jobs.job import Job
from .request import MAX_SIDE, MAX_STEPS
from .runs import Run, Skipped
from .state import App

MAX_CELLS = 100
KEPT_CELLS = 2000
MAX_TEXT = 4000
BASE_ALONE = "none"
EXAMPLES = {"seed": ", for example 1..4", "weight": ", for example 0, 0.5, 1"}


@dataclass(frozen=True)
class Comparison:
    """A finished grid: labeled cells, and copies of its sheet and its description that a page may download.

    ``across``: the number of the first row's last cell.
    """

    cells: tuple[tuple[str, Path], ...]
    sheet: Path
    report: Path
    across: int


def build_axis(app: App, name: str, values: str, adapter: str) -> Axis:
    """An axis from the page. Adapters are named as in the library, never by path.

    Raises :class:`UserError` for an unknown axis or name, and for steps or methods that there are not.
    """
    if not name or name == BASE_ALONE:
        return NO_AXIS
    if name not in AXES:
        raise UserError(f"there is no axis {name[:40]!r}: choose one of {', '.join(AXES)}")
    if len(values or "") > MAX_TEXT:
        raise UserError(f"an axis has more than {MAX_TEXT} characters: take some values out")
    words = [word.strip() for word in re.split("[|,\n]", values or "") if word.strip()]
    if not words:
        raise UserError(f"there are no values of {name!r} to compare: write some{EXAMPLES.get(name, '')}")
    if name == "adapter":
        return Axis(name, tuple(words), tuple({"adapter": _path(app, word)} for word in words))
    if name == "method":
        found = {entry.info.method: entry for entry in reversed(siblings(app, adapter)) if entry.info}
        return Axis(name, tuple(words), tuple({"adapter": str(_known(found, word, "method").file)} for word in words))
    if name == "step":
        steps = {str(step): file for step, file in checkpoints(app, adapter).items()}
        return Axis(name, tuple(words), tuple({"adapter": str(_known(steps, word, "step"))} for word in words))
    return parse_axis(f"{name}={values}")


def _known(table: dict[str, Any], word: str, what: str) -> Any:
    if word not in table:
        raise UserError(f"there is no {what} {word[:40]!r} of this subject: it has {', '.join(table) or 'none'}")
    return table[word]


def _path(app: App, name: str) -> str | None:
    if name in NONE:
        return None
    entry = app.library.entry(name)
    if misfit := app.misfit(entry):
        raise UserError(f"the adapter {name!r} cannot be used here: {misfit}")
    return str(entry.file)


def siblings(app: App, adapter: str) -> list[Entry]:
    """Adapters of the same subject (trigger and class word) that fit the base, newest first."""
    if not adapter or adapter in NONE:
        return []
    info = app.library.entry(adapter).info
    return [
        e
        for e in app.library.entries()
        if info and e.info and (e.info.trigger, e.info.class_word) == (info.trigger, info.class_word)
        if not app.misfit(e)
    ]


def job_of(app: App, adapter: str) -> Job | None:
    """The training that an adapter of the library came from."""
    return next((job for job in app.jobs.list() if job.adapter is not None and job.adapter.name == adapter), None)


def checkpoints(app: App, adapter: str) -> dict[int, Path]:
    """The adapter files of a subject's training by step."""
    job = None if not adapter or adapter in NONE else job_of(app, adapter)
    if job is None:
        return {}
    found = checkpoint_steps(job.folder / "run" / CHECKPOINTS)
    return {step: file for step, place in found.items() if (file := place / FILE_NAME).is_file()}


def suggestion(app: App, name: str, adapter: str, prompt: str) -> str:
    """Values to start with, once an axis is chosen."""
    if name == "adapter":
        names = [e.name for e in app.library.entries() if e.info and not app.misfit(e)]
        return ", ".join([BASE_ALONE, *names[:4]])
    if name == "method":
        return ", ".join(dict.fromkeys(e.info.method for e in siblings(app, adapter) if e.info))
    if name == "step":
        return ", ".join(map(str, checkpoints(app, adapter)))
    return {
        "weight": "0, 0.5, 1", "seed": "1..4", "steps": "5, 10, 20", "guidance": "2, 5, 8", "prompt": f"{prompt} | ",
    }.get(name, "")  # fmt: skip


def check_size(config: GridConfig) -> GridConfig:
    """Raises :class:`UserError` for a grid that a page may not ask for."""
    cells = config.cells()
    if len(cells) > MAX_CELLS:
        raise UserError(f"{len(cells)} cells are too many here: {MAX_CELLS} are the limit; see nora-diffusion grid")
    for _, cell in cells:
        cell.sampling.check(MAX_STEPS, MAX_SIDE)
    return config


def build_grid(app: App, cell: Cell, axes: Sequence[Axis]) -> GridConfig:
    """The grid of a page; all of them share one folder of cells, so that none is ever made twice."""
    x, y, z = axes
    out = app.library.folder / ".grids"
    return check_size(GridConfig(cell, x, y, z, out=str(out), private=True))


def compare(app: App, config: GridConfig, adapter: str, scored: bool, run: Run) -> Comparison:
    """Make the grid on the device that ``run`` holds; raises what ``run.check`` raises when it is interrupted."""
    app.engine.use([])
    grid = Grid(config, app.engine.pipe)

    def watch(step: int, latents: Any) -> None:
        with contextlib.suppress(Skipped):
            run.check()
        run.report(step=step)

    for done, total in grid.make(watch):
        run.check()
        run.report(picture=min(done + 1, total), pictures=total, step=0, steps=config.cell.sampling.steps)
    judge, references = _judge(app, adapter) if scored else (None, [])
    made = grid.finish(judge, references)
    folder = grid.folder
    result = Comparison(
        tuple((cell_label(config, cell), cell.file) for cell in made),
        Path(app.hand_out(folder / "grid.png")),
        Path(app.hand_out(folder / "grid.json")),
        last_across([cell.position for cell in made]),
    )
    _prune(folder / "cells", {cell.file for cell in made})
    return result


def last_across(places: Sequence[tuple[int, ...]]) -> int:
    """The last cell of the first row, which differs from the first cell in one thing; in a column alone its last."""
    row = [number for number, place in enumerate(places) if place[1:] == places[0][1:]]
    return row[-1] if len(row) > 1 else len(places) - 1


def _judge(app: App, adapter: str) -> tuple[Any, list[Any]]:
    from ..data import read_images
    from ..scoring.judges import load_judge

    job = job_of(app, adapter) if adapter and adapter not in NONE else None
    references = [photo.image for photo in read_images(job.folder / "photos")] if job else []
    return (load_judge(), references) if app.engine.is_embedded else (None, [])


def cell_label(config: GridConfig, cell: MadeCell) -> str:
    """A cell in words: its place on every axis."""
    axes = zip((config.x, config.y, config.z), cell.position, strict=True)
    return ", ".join(title for axis, place in axes if (title := axis.title(place)))


def _prune(folder: Path, keep: set[Path]) -> None:
    """Old cells beyond the limit go; those of this grid stay."""
    files = sorted(folder.glob("*.png"), key=lambda file: -file.stat().st_mtime)
    for file in files[KEPT_CELLS:]:
        if file not in keep:
            file.unlink(missing_ok=True)
