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
from ...io.untrusted import conform, parse_json

log = logging.getLogger(__name__)

Status = Literal["starting", "training", "saving", "done", "interrupted", "failed"]
SPARE_BYTES = 16 * 2**20
STATE_SECONDS = 0.5
MAX_NUMBER = 1e300
"""Largest loss and time of a step that are read from ``log.jsonl``."""
EXPORTS = "exports"
RUN_MARKERS = (STATE, LOG, FILE_NAME)
"""A folder with any of these files holds a run."""
RUN_NAMES = (
    CONFIG, REPORT, MEASURED, "README.md", data_report.HTML_NAME, data_report.JSON_NAME,
    CHECKPOINTS, SAMPLES, VALIDATION, CANDIDATES, EXPORTS,
)  # fmt: skip
"""Other names that a run writes. Files of the user may have the same names."""


class RunFolder:
    """Context manager that creates and locks ``output_dir``. Raises :class:`UserError` if it cannot be used.

    Files of an earlier run are not touched before :meth:`claim`; a folder that was created and never claimed is removed
    on exit. Processes other than rank 0 (``owner=False``) write nothing. A folder that holds no run but has files with
    the names of a run's files is refused, unless ``overwrite`` is set.
    """

    def __init__(self, path: Path, owner: bool = True, overwrite: bool = False) -> None:
        self.path = path
        self.owner = owner
        self._overwrite = overwrite
        self._created = False
        self._claimed = False
        self._lock = FileLock(path / LOCK)
        self._earlier: dict[str, Any] = {}
        self._state: dict[str, Any] = {}
        self._state_time = 0.0
        self._warned = False

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def samples(self) -> Path:
        """The folder of sample images."""
        return self.path / SAMPLES

    @property
    def adapter(self) -> Path:
        """The file of the finished adapter."""
        return self.path / FILE_NAME

    @property
    def status(self) -> Status | None:
        """The status last written to ``state.json``."""
        return self._state.get("status")

    @property
    def was_done(self) -> bool:
        """Whether an earlier run in this folder has trained and saved everything up to its last checkpoint."""
        steps = checkpoint_steps(self.checkpoints)
        is_last = self._earlier.get("step") == max(steps, default=None)
        return self._earlier.get("status") == "done" and is_last and self.adapter.exists()

    def __enter__(self) -> RunFolder:
        if not self.owner:
            return self
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"the output folder {self.path} is a file: choose another --output_dir")
        if not self._overwrite:
            self._refuse_foreign_files()
        self._created = not self.path.exists()
        make_folder(self.path)
        try:
            if not self._lock.try_acquire():
                raise UserError(
                    f"another training runs in {self.path}{self._holder()}: wait for it, or choose another --output_dir"
                )
            self.require(SPARE_BYTES)
            self._write_holder()
            self._read_earlier()
        except BaseException:
            self._release()
            raise
        return self

    def _write_holder(self) -> None:
        handle = self._lock.handle
        assert handle is not None
        with user_errors(self._lock.path):
            os.truncate(handle, 0)
            os.write(handle, str(os.getpid()).encode())

    def _refuse_foreign_files(self) -> None:
        if self.holds_a_run() or any((self.path / name).exists() for name in RUN_MARKERS):
            return
        taken = [name for name in RUN_NAMES if _is_used(self.path / name)]
        if taken:
            raise UserError(
                f"{self.path} holds no run, and a run would write into or over {', '.join(taken)}: "
                "choose another --output_dir, or set --overwrite_output_dir"
            )

    def _holder(self) -> str:
        with contextlib.suppress(OSError, ValueError):  # Windows does not allow reading a locked file
            return f" (process {int(self._lock.path.read_text())})"
        return ""

    def _read_earlier(self) -> None:
        """Read the state of an earlier run; warn if it was killed: its lock is free, but it says that it is running."""
        self._earlier = read_state(self.path)
        if self._earlier.get("status") in ("starting", "training", "saving"):
            log.warning(
                "the earlier run in %s was killed at step %s, probably because it ran out of memory (use a smaller "
                "--train_batch_size or --gradient_checkpointing) or by a power cut",
                self.path, self._earlier.get("step", 0),
            )  # fmt: skip

    def __exit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        held = self._lock.handle is not None
        self._lock.release()
        if self._created and not self._claimed:
            with contextlib.suppress(OSError):
                if held:
                    (self.path / LOCK).unlink()
                self.path.rmdir()

    def claim(self, fresh: bool, config: Mapping[str, Any]) -> None:
        """Start writing: replace ``config.yaml``; if ``fresh``, delete checkpoints, images and log of an earlier run.

        Files that a run does not write are not touched; the earlier adapter stays until the new one replaces it.
        ``config.yaml`` has every setting with its final value, so that ``--config`` repeats the run.
        """
        import yaml

        if not self.owner:
            return
        self._claimed = True
        if fresh:
            self._remove_earlier()
            with user_errors(self.path / LOG):
                (self.path / LOG).touch()  # marks the folder as a run even if the process is killed right here
        write_atomic(self.path / CONFIG, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    def _remove_earlier(self) -> None:
        candidates, validation = self.path / CANDIDATES, self.path / VALIDATION
        leftovers = [path for mark in ("tmp", "old") for path in self.checkpoints.glob(f".{mark}-step-*")]
        saved = (*checkpoint_steps(self.checkpoints).values(), *checkpoint_steps(candidates).values())
        for folder in (*saved, *leftovers):
            shutil.rmtree(folder, ignore_errors=True)
        images = [p for folder in (self.samples, validation) for ps in images_by_step(folder).values() for p in ps]
        for path in (*images, *(self.path / name for name in (LOG, MEASURED, REPORT))):
            path.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.samples, validation, candidates):
            with contextlib.suppress(OSError):  # absent, or it holds other files
                folder.rmdir()

    def require(self, size: int) -> None:
        """Raise :class:`UserError` unless the folder exists and ``size`` bytes are free on its disk."""
        if not self.path.is_dir():
            raise UserError(
                f"{self.path} was removed or renamed during the run: start it again in another --output_dir"
            )
        free = shutil.disk_usage(self.path).free
        if free < size:
            raise UserError(
                f"{self.path} has {free / 2**20:.0f} MiB left, but {size / 2**20:.0f} MiB are needed: free some space"
            )

    def sync_log(self) -> None:
        """Flush ``log.jsonl`` to disk: after a power cut it must have all steps up to the checkpoint."""
        with user_errors(self.path / LOG), (self.path / LOG).open("rb") as file:
            os.fsync(file.fileno())

    def steps(self) -> list[tuple[int, float, float]]:
        """Step, loss and seconds of every line of ``log.jsonl``, including steps from before a resume."""
        rows = []
        for line in _lines(self.path / LOG):
            with contextlib.suppress(ValueError, KeyError):
                row = _row(line)
                loss, seconds = (conform(row[name], float, name, MAX_NUMBER) for name in ("loss", "seconds"))
                rows.append((row["step"], loss, seconds))
        return rows

    def holds_a_run(self) -> bool:
        """Whether the folder has checkpoints or an adapter of an earlier run."""
        return self.adapter.exists() or bool(checkpoint_steps(self.checkpoints))

    def state(self, status: Status, **values: Any) -> None:
        """Update ``state.json``: immediately if the status changes, else at most twice a second."""
        if not self._claimed:
            return
        now = time.monotonic()
        changed = status != self._state.get("status")
        self._state |= {"status": status, "pid": os.getpid(), "time": time.time(), **values}
        if not changed and now - self._state_time < STATE_SECONDS:
            return
        self._state_time = now
        temporary = self.path / f".{STATE}.tmp"
        # Atomic for readers, but not flushed to disk: a step must neither wait for this nor fail because of it.
        try:
            temporary.write_text(json.dumps(self._state), encoding="utf-8")
            temporary.replace(self.path / STATE)
        except OSError as error:
            if not self._warned:
                log.warning("state.json cannot be written, so the app shows no progress: %s", error.strerror)
            self._warned = True


def read_state(folder: Path) -> dict[str, Any]:
    """The content of a run's ``state.json``; empty if it cannot be read."""
    try:
        state = parse_json((folder / STATE).read_bytes())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


class RunLog:
    """Writes ``log.jsonl``, one flushed line per step. Drops lines after ``resumed_step`` when it opens the file."""

    def __init__(self, path: Path, resumed_step: int, owner: bool = True) -> None:
        self.path = path
        self._file: IO[str] | None = None
        if owner:
            self._drop_after(resumed_step)
            with user_errors(path):
                self._file = path.open("a", encoding="utf-8")

    def _drop_after(self, step: int) -> None:
        if self.path.exists():
            write_atomic(self.path, b"".join(line + b"\n" for line in _lines(self.path) if _is_until(line, step)))

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
    """Whether the path is a file or a folder that is not empty."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _lines(log: Path) -> list[bytes]:
    """The lines of ``log.jsonl``, which a crash or a damaged disk may have left as anything."""
    try:
        return log.read_bytes().splitlines()
    except FileNotFoundError:
        return []


def _row(line: bytes) -> dict[str, Any]:
    """The values of one line. Raises ``ValueError`` if it is not a JSON object with a step."""
    row = parse_json(line)
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise ValueError("not a step")
    return row


def _is_until(line: bytes, step: int) -> bool:
    try:
        return bool(_row(line)["step"] <= step)
    except ValueError:
        return False
