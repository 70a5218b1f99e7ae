"""Trains the cells of a sweep: those that are missing, in this process, in several, or as tasks of a Ray cluster."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...io.files import write_atomic
from ..many.cluster import train_group, train_on_cluster
from ..many.subjects import train_subjects
from ..settings.config import TrainConfig, tagged
from .cells import Cell

LISTS = "cells"


def run_sweep(
    cells: Sequence[Cell], out: Path, *, workers: int = 1, at_once: int = 1, engine: str = "local",
    address: str | None = None,
) -> list[str]:  # fmt: skip
    """Train every cell of a sweep in ``out/NAME``, as ``train --subjects`` does; return what failed.

    Finished cells are not trained again, and interrupted ones go on from their last checkpoint. A cell that fails does
    not stop the others. ``workers``: processes on this machine. ``at_once``: cells in one process or task; those with
    the same base share its forward passes. ``engine="ray"``: tasks of the cluster at ``address``.

    Raises :class:`UserError` for a cell with an invalid setting, before anything is trained.
    """
    configs = [_config(cells, out, number) for number, cells in enumerate(_groups(cells))]
    for config, group in configs:
        _write_list(Path(config.subjects or ""), group)
    if engine == "ray":
        on_cluster = [_resuming(config, [cell.name for cell in group]) for config, group in configs]
        return [error for config in on_cluster for error in _on_cluster(config, at_once, address)]
    tasks = [
        (_resuming(config, chunk), chunk)
        for config, group in configs
        for chunk in _chunks([cell.name for cell in group], at_once)
    ]
    return [error for error in _locally(tasks, workers) if error]


def _groups(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells that can share a run: their settings that concern the base or the whole run are equal."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(json.dumps(_shared(cell), sort_keys=True), []).append(cell)
    return [*groups.values()]


def _shared(cell: Cell) -> dict[str, Any]:
    return {key: value for key, value in cell.settings.items() if key in tagged("shared")}


def _config(cells: Sequence[Cell], out: Path, number: int) -> tuple[TrainConfig, Sequence[Cell]]:
    """The config of a group; every cell's settings are checked."""
    for cell in cells:
        try:
            TrainConfig.from_mapping(cell.settings)
        except UserError as error:
            raise UserError(f"{cell.name}: {error}") from error
    place = {"subjects": str(out / LISTS / f"{number}.yaml"), "output_dir": str(out)}
    return TrainConfig.from_mapping({**_shared(cells[0]), **place}), cells


def _write_list(file: Path, cells: Sequence[Cell]) -> None:
    """The cells as a list for ``--subjects``; JSON is YAML."""
    rows = [
        {"name": cell.name, **{key: value for key, value in cell.settings.items() if key not in tagged("shared")}}
        for cell in cells
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(rows, indent=1, ensure_ascii=False))


def _resuming(config: TrainConfig, names: Iterable[str]) -> TrainConfig:
    """The config that continues from the last checkpoints, if any of these cells was started."""
    started = any((config.folder / name).exists() for name in names)
    return replace(config, resume_from_checkpoint="latest" if started else None)


def _chunks(names: Sequence[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(names), size):
        yield list(names[start : start + size])


def _on_cluster(config: TrainConfig, at_once: int, address: str | None) -> list[str]:
    values = {**config.to_dict(), "engine": "ray", "address": address, "subjects_per_task": at_once}
    try:
        train_on_cluster(TrainConfig(**values))
    except UserError as error:
        return str(error).splitlines()
    return []


def _locally(tasks: Sequence[tuple[TrainConfig, list[str]]], workers: int) -> Iterator[str]:
    """The error messages of the tasks, empty where one succeeded."""
    if workers == 1:
        for config, names in tasks:
            try:
                train_subjects(config, names, skip_failing=True)
            except UserError as error:
                yield str(error)
        return
    folder = str(Path.cwd())
    # spawn: torch's threads do not survive a fork
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(train_group, config.to_dict(), names, folder): names for config, names in tasks}
        try:
            for done in as_completed(running):
                try:
                    yield done.result()
                except BrokenProcessPool:
                    lost = ", ".join(running[done])
                    yield f"{lost}: a process was killed, probably out of memory: use fewer --workers"
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()  # SIGTERM: the cells in it save a checkpoint
            raise
