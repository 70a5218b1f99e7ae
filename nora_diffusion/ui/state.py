"""What all pages of a running app share."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..errors import UserError
from .config import AppConfig
from .device import Device
from .engine import Engine
from .entries import Entry, Stamp
from .jobs.jobs import Jobs
from .library import Library
from .runs import Runs

MAX_HANDED = 1000
"""Copies of pictures that pages may still show."""


@dataclass
class App:
    """The shared state: settings, the line before the device, the library and the engine that holds the pipeline.

    A handler that needs the device takes a turn: ``with app.device.join("generating"): ...``. A training that runs as
    a process of its own keeps its turn as long as the process lives.
    """

    config: AppConfig
    scratch: Path
    """Private folder for files that are handed to the browser; emptied when the server ends."""
    _handed: dict[tuple[Path, int], Path] = field(default_factory=dict)
    _handing: threading.Lock = field(default_factory=threading.Lock)
    _overlaps: dict[tuple[Stamp, ...], float] = field(default_factory=dict)
    runs: Runs = field(default_factory=Runs)

    @cached_property
    def device(self) -> Device:
        """The line before the device, shared with trainings by a lock file."""
        return Device(self.jobs.device_lock)

    @cached_property
    def jobs(self) -> Jobs:
        """The trainings, in ``.jobs`` of the library."""
        folder = self.library.folder / ".jobs"
        return Jobs(folder, self.library.folder, folder / "device.lock", self.config.source.device)

    @cached_property
    def library(self) -> Library:
        """The adapters in ``config.library_folder``."""
        return Library(self.config.library_folder)

    @cached_property
    def engine(self) -> Engine:
        """The one pipeline. Only whoever holds the device may generate with it."""
        return Engine(self.config.source.absolute())

    def warm_up(self) -> None:
        """Load the base ahead of the first picture; what goes wrong is said here, and to whoever asks for one."""
        try:
            with self.device.join("loading the base"):
                _ = self.engine.pipe
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)

    def make_room(self) -> None:
        """For a training that was started just now: take the base from the accelerator before it begins."""

        def leave() -> None:
            with contextlib.suppress(UserError), self.device.join("making room for a training"):
                self.engine.rest()

        if not self.engine.rests:
            threading.Thread(target=leave, name="make room", daemon=True).start()

    def hand_out(self, file: Path) -> str:
        """A copy of a file that a page may show or download: nothing outside the private folder is served.

        The copies that were asked for last are kept.
        """
        stamp = (file, file.stat().st_mtime_ns)
        with self._handing:
            copy = self._handed.pop(stamp, None)
            self._handed[stamp] = copy if copy and copy.exists() else self.copy_for_good(file)
            while len(self._handed) > MAX_HANDED:
                shutil.rmtree(self._handed.pop(next(iter(self._handed))).parent, ignore_errors=True)
            return str(self._handed[stamp])

    def copy_for_good(self, file: Path) -> Path:
        """The same for what every page shows, as long as the app runs."""
        return Path(shutil.copyfile(file, self.private_folder() / file.name))

    def private_folder(self) -> Path:
        """A new empty folder whose files may be handed to the browser."""
        return Path(tempfile.mkdtemp(dir=self.scratch))

    def overlap(self, one: str, two: str) -> float:
        """How much two adapters of the library change the same, 0 to 1; 0 too where that is no one number (MoR)."""
        from ..composition.angles import overlap_files

        try:
            entries = [self.library.entry(name) for name in (one, two)]
            key = tuple(entry.stamp for entry in entries)
            if key not in self._overlaps:
                self._overlaps[key] = overlap_files(entries[0].file, entries[1].file).score
            return self._overlaps[key]
        except UserError:
            return 0.0

    def misfit(self, entry: Entry) -> str | None:
        """Why an adapter cannot be used here, or None."""
        if entry.fault or entry.info is None:
            return entry.fault
        return self.engine.misfit(entry.info)

    def require_changes(self) -> None:
        """Call it inside every handler that trains, uploads or deletes: endpoints answer over HTTP, hidden or not."""
        if not self.config.may_change:
            raise UserError("this server is shared: start it with --allow_changes to train, upload and delete")
