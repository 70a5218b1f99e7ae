"""The folder of a run: its lock, ``config.yaml``, ``state.json`` and ``log.jsonl``."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

from ...data import report as data_report
from ...errors import UserError
from ...formats.adapter_file import FILE_NAME
from ...io.files import FileLock, make_folder, user_errors, write_atomic
from ...io.run_layout import (
    CANDIDATES,
    CHECKPOINTS,
    CONFIG,
    LOCK,
    LOG,
    MEASURED,
    REPORT,
    SAMPLES,
    STATE,
    VALIDATION,
    checkpoint_steps,
    images_by_step,
)

log = logging.getLogger(__name__)

Status = Literal["starting", "training", "saving", "done", "interrupted", "failed"]
SPARE_BYTES = 16 * 2**20
STATE_SECONDS = 0.5
EXPORTS = "exports"
MARKS = (STATE, LOG, FILE_NAME)
"""A folder with one of them holds a run."""
WRITTEN = (
    CONFIG, REPORT, MEASURED, "README.md", data_report.HTML_NAME, data_report.JSON_NAME,
    CHECKPOINTS, SAMPLES, VALIDATION, CANDIDATES, EXPORTS,
)  # fmt: skip
"""Names that a run takes for itself, and somebody else may have, too."""


class RunFolder:
    """Context manager that owns ``output_dir``: created, writable and locked, or a :class:`UserError`.

    Until :meth:`claim` nothing of an earlier run is touched; a folder made for nothing is removed again.
    In processes beside the first one (``owner=False``) it writes nothing. A folder that is no run's and has files in
    the way of one is refused, but with ``overwrite``.
    """

    def __init__(self, path: Path, owner: bool = True, overwrite: bool = False) -> None:
        self.path = path
        self.owner = owner
        self._overwrite = overwrite
        self._created = False
        self._claimed = False
        self._lock = FileLock(path / LOCK)
        self._state: dict[str, Any] = {}
        self._state_time = 0.0
        self._told = False

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.path / CHECKPOINTS

    @property
    def samples(self) -> Path:
        """Where sample pictures go."""
        return self.path / SAMPLES

    @property
    def adapter(self) -> Path:
        """The finished adapter."""
        return self.path / FILE_NAME

    @property
    def status(self) -> Status | None:
        """What ``state.json`` was last told."""
        return self._state.get("status")

    def __enter__(self) -> RunFolder:
        if not self.owner:
            return self
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"the output folder {self.path} is a file: choose another --output_dir")
        if not self._overwrite:
            self._spare_others()
        self._created = not self.path.exists()
        make_folder(self.path)
        if not self._lock.try_acquire():
            raise UserError(
                f"another training runs in {self.path}{self._holder()}: wait for it or choose another --output_dir"
            )
        handle = self._lock.handle
        assert handle is not None
        os.truncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        self._say_how_it_ended()
        try:
            self.require(SPARE_BYTES)
        except UserError:
            self._leave()
            raise
        return self

    def _spare_others(self) -> None:
        if self.holds_a_run() or any((self.path / name).exists() for name in MARKS):
            return
        there = [name for name in WRITTEN if _is_used(self.path / name)]
        if there:
            raise UserError(
                f"{self.path} is in use and holds no run, whose files would go between or over {', '.join(there)}: "
                "choose another --output_dir, or give --overwrite_output_dir"
            )

    def _holder(self) -> str:
        with contextlib.suppress(OSError, ValueError):  # Windows lets nobody read what is locked
            return f" (process {int(self._lock.path.read_text())})"
        return ""

    def _say_how_it_ended(self) -> None:
        """The lock was free, so a process that ``state.json`` shows at work is gone, whoever has its number now."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            before = json.loads((self.path / STATE).read_text(encoding="utf-8"))
            if before.get("status") in ("starting", "training", "saving"):
                log.warning(
                    "the earlier run in %s was killed at step %s, probably for want of memory (a smaller "
                    "--train_batch_size or --gradient_checkpointing needs less) or by a power cut",
                    self.path, before.get("step", 0),
                )  # fmt: skip

    def __exit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        self._lock.release()
        if self._created and not self._claimed:
            with contextlib.suppress(OSError):
                (self.path / LOCK).unlink()
                self.path.rmdir()

    def claim(self, anew: bool, config: Mapping[str, Any]) -> None:
        """From here on this run's files replace the earlier ones; ``anew`` removes its checkpoints, pictures and log.

        What has no name of ours stays, and the earlier adapter until the new one replaces it. ``config.yaml`` holds
        every setting resolved: ``--config`` with it repeats the run.
        """
        import yaml

        if not self.owner:
            return
        self._claimed = True
        if anew:
            self._remove_earlier()
            with user_errors(self.path / LOG):
                (self.path / LOG).touch()  # a mark: a run killed in the next line is known by it
        write_atomic(self.path / CONFIG, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    def _remove_earlier(self) -> None:
        candidates, validation = self.path / CANDIDATES, self.path / VALIDATION
        rests = [path for mark in ("tmp", "old") for path in self.checkpoints.glob(f".{mark}-step-*")]
        for place in (*checkpoint_steps(self.checkpoints).values(), *checkpoint_steps(candidates).values(), *rests):
            shutil.rmtree(place, ignore_errors=True)
        pictures = [p for place in (self.samples, validation) for own in images_by_step(place).values() for p in own]
        for path in (*pictures, *(self.path / name for name in (LOG, MEASURED, REPORT))):
            path.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.samples, validation, candidates):
            with contextlib.suppress(OSError):  # not there, or something else is in it
                folder.rmdir()

    def require(self, size: int) -> None:
        """Raise :class:`UserError` unless ``size`` bytes are free on the folder's disk."""
        free = shutil.disk_usage(self.path).free
        if free < size:
            raise UserError(
                f"{self.path} has {free / 2**20:.0f} MiB left, {size / 2**20:.0f} are needed: free some space"
            )

    def sync_log(self) -> None:
        """Flush ``log.jsonl`` to disk: after a power cut it must reach as far as the checkpoint does."""
        with user_errors(self.path / LOG), (self.path / LOG).open("rb") as file:
            os.fsync(file.fileno())

    def steps(self) -> list[tuple[int, float, float]]:
        """Step, loss and seconds of every line of ``log.jsonl``, those of earlier starts of the run included."""
        rows = []
        with contextlib.suppress(OSError):
            for line in (self.path / LOG).read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut short by a crash
                    row = json.loads(line)
                    rows.append((int(row["step"]), float(row["loss"]), float(row["seconds"])))
        return rows

    def holds_a_run(self) -> bool:
        """Whether an earlier run left checkpoints or an adapter here."""
        return self.adapter.exists() or bool(checkpoint_steps(self.checkpoints))

    def state(self, status: Status, **values: Any) -> None:
        """Replace ``state.json``: at once when the status changes, else at most twice a second."""
        if not self._claimed:
            return
        now = time.monotonic()
        changed = status != self._state.get("status")
        self._state |= {"status": status, "pid": os.getpid(), "time": time.time(), **values}
        if not changed and now - self._state_time < STATE_SECONDS:
            return
        self._state_time = now
        temporary = self.path / f".{STATE}.tmp"
        # Renamed for whoever watches, but not flushed to disk: a step must not wait for it, nor fail with it.
        try:
            temporary.write_text(json.dumps(self._state), encoding="utf-8")
            temporary.replace(self.path / STATE)
        except OSError as error:
            if not self._told:
                log.warning("state.json cannot be written, so who watches sees no progress: %s", error.strerror)
            self._told = True


class RunLog:
    """``log.jsonl``: one line a step, flushed; lines after a resumed step are dropped first."""

    def __init__(self, path: Path, resumed_step: int, owner: bool = True) -> None:
        self.path = path
        self._file: IO[str] | None = None
        if owner:
            self._keep(resumed_step)
            with user_errors(path):
                self._file = path.open("a", encoding="utf-8")

    def _keep(self, last: int) -> None:
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) <= last]
        write_atomic(self.path, "".join(line + "\n" for line in kept))

    def write(self, **values: Any) -> None:
        """Append one line."""
        if self._file is not None:
            with user_errors(self.path):
                self._file.write(json.dumps(values) + "\n")
                self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _is_used(path: Path) -> bool:
    """Whether a file is there, or a folder with something in it."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a crash
