"""The cells of a grid, made by a server: some requests at a time, so that they share its passes."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...errors import UserError
from ...evaluation.axes import Cell
from ...generation.image_settings import save_image
from ...generation.tags import Tag
from ...serving.client import Client, Made, ServerError, Step
from ..runs import Run
from .asking import LOOK_SECONDS, body_of, refuse_failed

AT_ONCE = 8
"""Requests of one grid that a server has at a time: others want to use it too."""
TRIES = 20
TOO_MANY = 429


class Cells:
    """Makes the images of cells into files. ``files``: the file of each cell; equal cells may share one."""

    def __init__(self, client: Client, run: Run, files: Mapping[Path, Cell]) -> None:
        self.client, self.run, self.files = client, run, files
        self._made: set[Path] = set()
        self._steps: dict[Path, int] = {}
        self._ended = threading.Event()
        self._lock = threading.Lock()

    def make(self) -> None:
        """Make them all. Raises the first error, and what ``run.check_stop`` raises; then the others are cancelled."""
        self._note()
        with ThreadPoolExecutor(AT_ONCE, "cells") as pool:
            try:
                for made in [pool.submit(self._make, file, cell) for file, cell in self.files.items()]:
                    made.result()
            finally:
                self._ended.set()
                pool.shutdown(cancel_futures=True)

    def _make(self, file: Path, cell: Cell) -> None:
        """Make one; a server that has too many requests is asked again when it says so."""
        for number in range(TRIES):
            try:
                self._ask(file, cell)
            except ServerError as error:
                if error.status != TOO_MANY or error.wait is None or number == TRIES - 1:
                    raise
                self._wait(error.wait)
            else:
                return

    def _ask(self, file: Path, cell: Cell) -> None:
        with self.client.stream(**body_of(prompt_of(cell), cell.seed, cell.sampling)) as stream:
            for event in stream.events(LOOK_SECONDS):
                self._check()
                refuse_failed(event)
                if isinstance(event, Made):
                    save_image(event.image, file, event.settings)
                if isinstance(event, Step | Made):
                    self._note(file, event)

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._check()
            self._ended.wait(LOOK_SECONDS)

    def _check(self) -> None:
        self.run.check_stop()
        if self._ended.is_set():
            raise UserError("another cell failed")

    def _note(self, file: Path | None = None, event: Step | Made | None = None) -> None:
        """Report what has happened to a cell."""
        with self._lock:
            if file is not None and isinstance(event, Step):
                self._steps[file] = event.step
            elif file is not None:
                self._made.add(file)
            ready = tuple(file for file in self.files if file in self._made)
            at_work = [step for file, step in self._steps.items() if file not in self._made]
            self.run.report(
                state="working", images=len(self.files), image=min(len(ready) + 1, len(self.files)), files=ready,
                steps=max(cell.sampling.steps for cell in self.files.values()), step=max(at_work, default=0),
            )  # fmt: skip


def prompt_of(cell: Cell) -> str:
    """The prompt of a cell with a tag, as its adapter is a subject's name."""
    tag = "" if cell.adapter is None else f" {Tag(cell.adapter, cell.weight, cell.weight)}"
    return f"{cell.prompt}{tag}"


def files_of(cells: Sequence[tuple[tuple[int, int, int], Cell]], folder: Path) -> dict[tuple[int, int, int], Path]:
    """The file of each cell by its position."""
    return {position: folder / "cells" / f"{'-'.join(map(str, position))}.png" for position, _ in cells}
