"""The state that all pages of a running app share."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError, reason
from ..io.files import make_folder
from ..serving.client import Client, read_key
from .backend import ELSEWHERE, Backend
from .config import AppConfig
from .device import Device
from .entries import Entry, Stamp
from .jobs.jobs import Jobs
from .library import Library
from .runs import Runs

MAX_COPIES = 1000
"""Number of files that stay copied for the browser."""
MAX_RUNS = 64
"""Requests of pages that a server works on together; more of them wait here."""
MAX_DOWNLOADS = 20
"""Number of exports that stay for download."""


class App:
    """The shared state: settings, library, training jobs, the queue for the device, and the engine with the pipeline.

    A handler that uses the device takes a turn: ``with app.device.join("images"): ...``. A training holds the device
    while its process is alive.

    ``scratch`` is a private folder for files that the browser may load; it is removed when the server stops.
    """

    def __init__(self, config: AppConfig, scratch: Path) -> None:
        self.config, self.scratch = config, make_folder(scratch)
        self.engine, self.library = _opened(config)
        jobs = self.library.folder / ".jobs"
        self.jobs = Jobs(jobs, self.library.folder, jobs / "device.lock", config.source.device)
        remote = self.engine.is_remote
        self.device = Device(None, MAX_RUNS, MAX_RUNS) if remote else Device(self.jobs.device_lock)
        self.runs = Runs()
        self._copies: dict[tuple[Path, int], Path] = {}
        self._copying = threading.Lock()
        self._downloads: deque[Path] = deque()
        self._overlaps: dict[tuple[Stamp, ...], float] = {}

    def warm_up(self) -> None:
        """Load the base before the first image. An error is printed here, and raised again for the first image."""
        try:
            with self.device.join("loading the base model"):
                self.engine.warm_up()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)

    def make_room(self) -> None:
        """Move the base off the accelerator for a training that was just started."""

        def offload() -> None:
            with contextlib.suppress(UserError), self.device.join("making room for a training"):
                self.engine.offload()

        if not self.engine.offloaded:
            threading.Thread(target=offload, name="make room", daemon=True).start()

    def hand_out(self, file: Path) -> str:
        """Copy a file to the private folder, since nothing outside it is served. The last copies used are kept."""
        stamp = (file, file.stat().st_mtime_ns)
        with self._copying:
            copy = self._copies.pop(stamp, None)
            self._copies[stamp] = copy if copy and copy.exists() else self.copy_permanently(file)
            while len(self._copies) > MAX_COPIES:
                shutil.rmtree(self._copies.pop(next(iter(self._copies))).parent, ignore_errors=True)
            return str(self._copies[stamp])

    def copy_permanently(self, file: Path) -> Path:
        """Copy a file to the private folder until the app stops."""
        with _temporary_folder():
            folder = self.private_folder()
            try:
                return Path(shutil.copyfile(file, folder / file.name))
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)
                raise

    @contextlib.contextmanager
    def download(self) -> Iterator[Path]:
        """A new folder for files to download. The last ones are kept; one whose block raises is not."""
        folder = self.private_folder()
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._downloads.append(folder)
        while len(self._downloads) > MAX_DOWNLOADS:
            shutil.rmtree(self._downloads.popleft(), ignore_errors=True)

    def private_folder(self) -> Path:
        """A new empty folder whose files the browser may load."""
        with _temporary_folder():
            return Path(tempfile.mkdtemp(dir=self.scratch))

    def overlap(self, one: str, two: str) -> float:
        """Overlap of two adapters' updates, 0 to 1; 0 if it cannot be computed from the files (MoR)."""
        if self.engine.is_remote:
            return 0.0
        from ..composition.angles import overlap_files

        try:
            entries = [self.library.entry(name) for name in (one, two)]
            key = tuple(entry.stamp for entry in entries)
            if key not in self._overlaps:
                self._overlaps[key] = overlap_files(entries[0].file, entries[1].file).score
            return self._overlaps[key]
        except UserError:
            return 0.0

    def problem(self, entry: Entry) -> str | None:
        """Why an adapter cannot be used with this base, or None."""
        if entry.error or entry.info is None:
            return entry.error
        return self.engine.mismatch(entry.info)

    @property
    def may_change(self) -> bool:
        """Whether users may train, upload and delete: on this machine, as a server has its own adapters."""
        return self.config.may_change and not self.engine.is_remote

    def require_changes(self) -> None:
        """Raise :class:`UserError` if users may not train, upload or delete.

        Every handler that does so calls it: hiding a button does not close its HTTP endpoint.
        """
        if self.engine.is_remote:
            raise UserError(ELSEWHERE)
        if not self.config.may_change:
            raise UserError("this server is shared: start it with --allow_changes to train, upload and delete")


def _opened(config: AppConfig) -> tuple[Backend, Library]:
    """What makes the images, and the adapters that it knows. Only a local base needs torch."""
    if config.server is None:
        from .engine import Engine

        return Engine(config.source.absolute()), Library(config.library_folder)
    from .remote.engine import RemoteEngine
    from .remote.library import RemoteLibrary
    from .remote.server import Server

    server = Server(Client(config.server, read_key(config.server_key)))
    return RemoteEngine(server), RemoteLibrary(config.library_folder, server)


@contextlib.contextmanager
def _temporary_folder() -> Iterator[None]:
    """Name the disk if the temporary folder cannot be written: it is another one than the library's."""
    try:
        yield
    except FileNotFoundError:
        raise  # the file to copy was deleted in the meantime
    except OSError as error:
        raise UserError(
            f"the disk with the app's temporary folder cannot be written ({reason(error)}): free space on it, or set "
            "TMPDIR to a folder on another disk and restart the app. Generated images are saved in the library"
        ) from error
