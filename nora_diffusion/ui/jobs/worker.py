"""The process of one training job: ``python -m nora_diffusion.ui.jobs.worker FOLDER``, started by :mod:`.jobs`.

It waits for the device, runs the trainer, checks that the adapter file is readable, copies it to the library, and
writes ``exit.json`` last. A job without that file whose process is gone was killed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import explanation, first_line
from ...io.files import (
    ABANDONED_SECONDS,
    FileLock,
    make_folder,
    numbered,
    reserved_name,
    sha256,
    sync_folder,
    user_errors,
    write_atomic,
)
from ...io.run_layout import SAMPLES, STATE, images_by_step
from ...io.yaml_text import read_yaml
from ...pipelines.base import is_embedded
from ...programs import program, run_program
from ..entries import SCORES, name_of
from .job import boot_id, read_job, read_json
from .sample_scores import SampleScores

if TYPE_CHECKING:
    from ...formats.adapter_info import AdapterInfo

UNREADABLE = 3


@program
def main(folder: Path) -> int:
    """Run the job of ``folder``. Returns the trainer's exit code, or 3 if its adapter cannot be used."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    outcome = _train(folder, job)
    write_atomic(folder / "exit.json", json.dumps(outcome))
    return int(outcome["code"])


def _train(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    lock = FileLock(Path(job["device_lock"]))
    try:
        _write_status(folder, waiting=False)  # from here on the job can be stopped
        if not lock.try_acquire():
            _write_status(folder, waiting=True)
            lock.acquire()
            _write_status(folder, waiting=False)
        # A finished run that could not be copied to the library (disk full, for example) is not trained again.
        code = 0 if is_finished(folder / "run") else _run_trainer(folder, job["flags"])
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the rest is short and must not be interrupted
        if code != 0:
            return {"code": code, "message": ""}
        adapter = publish(folder / "run", Path(job["library"]), str(job["name"]), final_scores(folder), folder)
        return {"code": 0, "message": "", "adapter": str(adapter)}
    except KeyboardInterrupt:
        return {"code": 143, "message": "stopped before training began"}
    except Exception as error:
        text = explanation(error)
        if text is None:
            traceback.print_exc()
        return {"code": UNREADABLE, "message": text or first_line(error)}
    finally:
        lock.release()


def _run_trainer(folder: Path, flags: list[str]) -> int:
    from ...training import main

    return main(["--config", str(folder / "request.yaml"), *flags])


def _write_status(folder: Path, waiting: bool) -> None:
    """Record this process and whether it waits for the device."""
    process = {"pid": os.getpid(), "boot": boot_id(), "waiting": waiting}
    write_atomic(folder / "process.json", json.dumps(process))


def is_finished(run: Path) -> bool:
    """Whether the trainer reported the run as done and its adapter exists."""
    from ...formats.adapter_file import FILE_NAME

    return read_json(run / STATE).get("status") == "done" and (run / FILE_NAME).is_file()


def final_scores(folder: Path) -> dict[str, float]:
    """Scores of the last samples by the judge model of the embedded base; empty for other bases.

    An error while scoring loses the scores but not the training.
    """
    settings = read_yaml(folder / "request.yaml", "request")
    if not is_embedded(settings.get("pretrained_model_name_or_path")):
        return {}
    try:
        curves = SampleScores().curves(read_job(folder))
    except Exception:
        traceback.print_exc()
        return {}
    return {f"{kind} fidelity": round(points[-1][1], 4) for kind, points in curves.items() if points}


def publish(run: Path, library: Path, name: str, scores: Mapping[str, float], job: Path | None = None) -> Path:
    """Copy a finished adapter into the library under an unused name, completely or not at all. Returns its folder.

    ``job``: the folder of the job, in which the start is recorded, so that a job that was killed before it wrote
    ``exit.json`` is not published twice. Raises :class:`UserError` if the file is not readable.
    """
    from ...formats.adapter_file import inspect_adapter, read_tensors

    info = inspect_adapter(run)
    read_tensors(info)
    make_folder(library)
    with user_errors(library):
        _remove_leftovers(library, job)
        if job is not None and (found := _published(job / "publishing", library, name, info)):
            return found
        temporary = library / f".new-{secrets.token_hex(4) if job is None else job.name}"
        try:
            temporary.mkdir(mode=0o700)
            shutil.copy2(info.path, temporary)
            if (run / "README.md").is_file():
                shutil.copy2(run / "README.md", temporary)
            if scores:
                write_atomic(temporary / SCORES, json.dumps(dict(scores)))
            if samples := images_by_step(run / SAMPLES):
                shutil.copy2(samples[max(samples)][0], temporary / "thumbnail.png")
            temporary.chmod(0o755)
            for file in temporary.iterdir():
                _flush(file)
            with reserved_name(library, name, name_of) as target:
                temporary.rename(target)  # replaces the empty folder that holds the name
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(library)
    return target


def _published(marker: Path, library: Path, name: str, info: AdapterInfo) -> Path | None:
    """The folder to which an earlier process of this job has copied the adapter; ``None`` if there is none.

    ``marker`` is created when the job starts to publish. An empty folder that is newer is the name that the earlier
    process had reserved, and is removed.
    """
    from ...formats.adapter_file import FILE_NAME

    if not marker.exists():
        marker.touch()
        return None
    since = marker.stat().st_mtime
    for folder in itertools.takewhile(Path.exists, numbered(library / name)):
        with contextlib.suppress(OSError):
            if folder.stat().st_mtime >= since and sha256(folder / FILE_NAME) == info.sha256:
                return folder
    for folder in itertools.takewhile(Path.exists, numbered(library / name)):
        with contextlib.suppress(OSError):
            if folder.stat().st_mtime >= since:
                folder.rmdir()  # only if it is empty
                break
    return None


def _remove_leftovers(library: Path, job: Path | None) -> None:
    """Remove what killed processes left: that of this job, and what is old; a younger one may still be written."""
    for folder in library.glob(".new-*"):
        with contextlib.suppress(OSError):
            age = time.time() - folder.stat().st_mtime
            if age > ABANDONED_SECONDS or (job is not None and folder.name == f".new-{job.name}"):
                shutil.rmtree(folder)


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


if __name__ == "__main__":
    run_program(main, Path(sys.argv[1]))
