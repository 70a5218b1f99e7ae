"""Grids for the Compare tab, generated with the app's pipeline."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation.axes import AXES, NONE, Axis, Cell, parse_axis
from ..evaluation.settings import NO_AXIS, GridConfig
from ..evaluation.sheet import MadeCell
from ..formats.adapter_file import FILE_NAME
from ..io.run_layout import CHECKPOINTS, checkpoint_steps
from .entries import Entry
from .jobs.job import Job
from .request import Request
from .runs import Run, Skipped
from .state import App

MAX_CELLS = 100
MAX_CACHED_CELLS = 2000
MAX_TEXT = 4000
NO_CHOICE = "none"
"""The dropdown entry for no adapter and for no axis."""
EXAMPLES = {"seed": ", for example 1..4", "weight": ", for example 0, 0.5, 1"}


@dataclass(frozen=True)
class Comparison:
    """A finished grid: labeled cells, and copies of the grid image and its JSON report for download.

    ``row_end``: index of the last cell of the first row.
    """

    cells: tuple[tuple[str, Path], ...]
    image: Path
    report: Path
    row_end: int


def build_axis(app: App, name: str, values: str, adapter: str) -> Axis:
    """Build an axis from the values on the page. Adapters are given by library name, never by path.

    Raises :class:`UserError` for an unknown axis, adapter, step or method.
    """
    if not name or name == NO_CHOICE:
        return NO_AXIS
    if name not in AXES:
        raise UserError(f"the axis {name[:40]!r} is unknown: choose one of {', '.join(AXES)}")
    if len(values or "") > MAX_TEXT:
        raise UserError(f"an axis has more than {MAX_TEXT} characters: remove some values")
    labels = [label.strip() for label in re.split("[|,\n]", values or "") if label.strip()]
    if not labels:
        raise UserError(f"the axis {name!r} has no values: enter some{EXAMPLES.get(name, '')}")
    if name == "adapter":
        return Axis(name, tuple(labels), tuple({"adapter": _path(app, label)} for label in labels))
    if name == "method":
        found = {entry.info.method: entry for entry in reversed(siblings(app, adapter)) if entry.info}
        return Axis(name, tuple(labels), tuple({"adapter": str(_lookup(found, label, name).file)} for label in labels))
    if name == "step":
        steps = {str(step): file for step, file in checkpoints(app, adapter).items()}
        return Axis(name, tuple(labels), tuple({"adapter": str(_lookup(steps, label, name))} for label in labels))
    return parse_axis(f"{name}={values}")


def _lookup(table: dict[str, Any], label: str, axis: str) -> Any:
    if label not in table:
        raise UserError(f"this subject has no {axis} {label[:40]!r}: choose one of {', '.join(table) or 'none'}")
    return table[label]


def _path(app: App, name: str) -> str | None:
    if name in NONE:
        return None
    entry = app.library.entry(name)
    if problem := app.problem(entry):
        raise UserError(f"the adapter {name!r} cannot be used with this base: {problem}")
    return str(entry.file)


def siblings(app: App, adapter: str) -> list[Entry]:
    """Usable adapters of the same subject (same trigger word and class word), newest first."""
    if not adapter or adapter in NONE:
        return []
    info = app.library.entry(adapter).info
    return [
        e
        for e in app.library.entries()
        if info and e.info and (e.info.trigger, e.info.class_word) == (info.trigger, info.class_word)
        if not app.problem(e)
    ]


def job_of(app: App, adapter: str) -> Job | None:
    """The training that produced an adapter of the library, or None."""
    return next((job for job in app.jobs.list() if job.adapter is not None and job.adapter.name == adapter), None)


def checkpoints(app: App, adapter: str) -> dict[int, Path]:
    """Checkpoints of an adapter's training: adapter file by step."""
    job = None if not adapter or adapter in NONE else job_of(app, adapter)
    if job is None:
        return {}
    found = checkpoint_steps(job.folder / "run" / CHECKPOINTS)
    return {step: file for step, path in found.items() if (file := path / FILE_NAME).is_file()}


def suggestion(app: App, name: str, adapter: str, prompt: str) -> str:
    """Suggested values for a newly chosen axis."""
    if name == "adapter":
        names = [e.name for e in app.library.entries() if e.info and not app.problem(e)]
        return ", ".join([NO_CHOICE, *names[:4]])
    if name == "method":
        return ", ".join(dict.fromkeys(e.info.method for e in siblings(app, adapter) if e.info))
    if name == "step":
        return ", ".join(map(str, checkpoints(app, adapter)))
    return {
        "weight": "0, 0.5, 1", "seed": "1..4", "steps": "5, 10, 20", "guidance": "2, 5, 8",
        "sampler": "ddim, euler_a, dpmpp_2m", "prompt": f"{prompt} | ",
    }.get(name, "")  # fmt: skip


def check_size(config: GridConfig) -> GridConfig:
    """Raise :class:`UserError` for a grid that is too large for the page."""
    cells = config.cells()
    if len(cells) > MAX_CELLS:
        raise UserError(f"{len(cells)} cells are too many: the limit is {MAX_CELLS} here, 1000 in nora-diffusion grid")
    for _, cell in cells:
        Request(((cell.prompt, cell.seed),), cell.sampling).check()
    return config


def build_grid(app: App, cell: Cell, axes: Sequence[Axis]) -> GridConfig:
    """The config of a grid. All grids share one folder of cells, so no cell is generated twice."""
    x, y, z = axes
    out = app.library.folder / ".grids"
    return check_size(GridConfig(cell, x, y, z, out=str(out), private=True))


def compare(app: App, config: GridConfig, adapter: str, scored: bool, run: Run) -> Comparison:
    """Generate the grid in a run. Raises :class:`.runs.Stopped` if it is interrupted."""
    if app.engine.is_remote:
        with app.download() as folder:
            return _comparison(app, config, app.engine.make_cells(config, folder, run), folder)
    made, folder = _made_here(app, config, adapter, scored, run)
    result = _comparison(app, config, made, folder)
    _prune(folder / "cells", {cell.file for cell in made})
    return result


def _comparison(app: App, config: GridConfig, made: Sequence[MadeCell], folder: Path) -> Comparison:
    return Comparison(
        tuple((cell_label(config, cell), cell.file) for cell in made),
        Path(app.hand_out(folder / "grid.png")),
        Path(app.hand_out(folder / "grid.json")),
        first_row_end([cell.position for cell in made]),
    )


def _made_here(app: App, config: GridConfig, adapter: str, scored: bool, run: Run) -> tuple[list[MadeCell], Path]:
    from ..evaluation.grid import Grid  # late: it imports torch

    app.engine.use([])
    grid = Grid(config, app.engine.pipe)

    def on_step(step: int, latents: Any) -> None:
        with contextlib.suppress(Skipped):
            run.check()
        run.report(step=step)

    files = list(dict.fromkeys(grid.files.values()))
    for done, total in grid.make(on_step, run.check_stop):
        ready = tuple(file for file in files if file.is_file())
        run.report(image=min(done + 1, total), images=total, step=0, steps=config.cell.sampling.steps, files=ready)
        run.check()
    judge, references = _judge(app, adapter) if scored else (None, [])
    return grid.finish(judge, references), grid.folder


def first_row_end(positions: Sequence[tuple[int, ...]]) -> int:
    """Index of the last cell of the first row, which differs from the first cell on one axis; else of the last cell."""
    row = [index for index, position in enumerate(positions) if position[1:] == positions[0][1:]]
    return row[-1] if len(row) > 1 else len(positions) - 1


def _judge(app: App, adapter: str) -> tuple[Any, Sequence[Any]]:
    from ..data import Pixels, read_images
    from ..scoring.judges import load_judge

    job = job_of(app, adapter) if adapter and adapter not in NONE else None
    references = Pixels(read_images(job.folder / "photos") if job else [])
    return (load_judge(), references) if app.engine.is_embedded else (None, [])


def cell_label(config: GridConfig, cell: MadeCell) -> str:
    """The label of a cell: its value on each axis."""
    axes = zip((config.x, config.y, config.z), cell.position, strict=True)
    return ", ".join(title for axis, index in axes if (title := axis.title(index)))


def _prune(folder: Path, keep: set[Path]) -> None:
    """Delete the oldest cells beyond the limit, but none of this grid."""
    files = sorted(folder.glob("*.png"), key=lambda file: -file.stat().st_mtime)
    for file in files[MAX_CACHED_CELLS:]:
        if file not in keep:
            file.unlink(missing_ok=True)
