"""Training jobs: separate processes that survive a reload of the page and a restart of the app.

A job is a private folder: ``job.json`` (name and paths), ``request.yaml`` (the trainer's settings), ``photos/``,
``run/`` (the trainer's folder), ``output.log``, ``alive.lock`` (locked while its process is alive), ``process.json``
and, once it has exited by itself, ``exit.json``. The app only reads these files, so a crash of the app harms no job.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...io.files import FileLock, is_held, user_errors, write_atomic
from ...io.yaml_text import read_yaml
from .job import Job, number_in, read_job, read_json, text_in

START_PATIENCE = 10.0
"""Seconds that a stop waits for a process that is still starting."""
MAX_STEM_BYTES = 200
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class Jobs:
    """The jobs under ``root``. Finished adapters go to ``library``; ``device_lock`` is shared with generation.

    They train on ``device``, or on the best one available.
    """

    def __init__(self, root: Path, library: Path, device_lock: Path, device: str | None = None) -> None:
        self.root, self.library, self.device_lock, self.device = root, library, device_lock, device

    def start(self, name: str, settings: Mapping[str, Any], images: Sequence[Path]) -> str:
        """Start a training on copies of ``images`` and of the captions next to them. Returns the job's id.

        ``settings`` are those of :class:`TrainConfig`. They are checked before anything is written.
        """
        _check_system()
        if not NAME.fullmatch(name):
            raise UserError(f"the name {name!r} is not valid: use up to 64 letters, digits, '_' and '-'")
        identity = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        folder = self.root / identity
        folders = {"instance_data_dir": folder / "photos", "output_dir": folder / "run"}
        values = {**settings, **{key: str(path.absolute()) for key, path in folders.items()}}
        _check(values)
        with user_errors(folder):
            folder.mkdir(parents=True, mode=0o700)
            copy_images(images, folders["instance_data_dir"])
        import yaml

        write_atomic(folder / "request.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        self._launch(folder, name, [])
        return identity

    def resume(self, identity: str) -> int:
        """Resume from the last complete checkpoint. Returns its step."""
        _check_system()
        job = self.get(identity)
        if job.running:
            raise UserError(f"the training {job.name!r} is still running")
        if not job.resumable or job.checkpoint is None:
            raise UserError(f"the training {job.name!r} has no checkpoint to resume from: start a new training")
        self._launch(job.folder, job.name, ["--resume_from_checkpoint", "latest"])
        return job.checkpoint

    def stop(self, identity: str) -> None:
        """Finish the current step, save a checkpoint and stop. Further calls change nothing."""
        job = self.get(identity)
        if not job.running:
            raise UserError(f"the training {job.name!r} is not running")
        if (job.folder / "stopping").exists():
            return
        pid = _pid(job.folder)
        (job.folder / "stopping").touch()
        # Signal only while the lock is held: then the pid belongs to the holder and is not stale.
        if is_held(job.folder / "alive.lock"):
            os.kill(pid, signal.SIGTERM)

    def remove(self, identity: str) -> None:
        """Delete a job that is not running, with its photos and checkpoints. Its adapter in the library stays."""
        job = self.get(identity)
        if job.running:
            raise UserError(f"the training {job.name!r} is running: stop it first")
        shutil.rmtree(job.folder)

    def list(self) -> list[Job]:
        """All jobs, newest first."""
        if not self.root.is_dir():
            return []
        names = sorted((f.parent.name for f in self.root.glob("*/job.json")), reverse=True)
        found = []
        for name in names:
            with contextlib.suppress(UserError):  # removed in the meantime
                found.append(self.get(name))
        return found

    def triggers(self) -> set[str]:
        """The trigger words of all jobs."""
        found = set()
        for file in self.root.glob("*/request.yaml"):
            with contextlib.suppress(UserError):  # removed in the meantime, or damaged
                values = read_yaml(file, "request")
                found |= set(text_in(values, "trigger").split()) if isinstance(values, dict) else set()
        return found

    def get(self, identity: str) -> Job:
        """One job by id. Raises :class:`UserError` for an unknown or invalid id."""
        folder = self.root / identity
        if not NAME.fullmatch(identity) or not (folder / "job.json").is_file():
            raise UserError("there is no such training: it was removed, or belongs to another library")
        return read_job(folder)

    def _launch(self, folder: Path, name: str, flags: Sequence[str]) -> None:
        alive = FileLock(folder / "alive.lock")
        until = time.monotonic() + 5.0  # a status check may hold the lock for a moment
        if not alive.acquire(canceled=lambda: time.monotonic() > until):
            raise UserError(f"the training {name!r} is still running")
        try:
            for stale in ("exit.json", "process.json", "stopping"):
                (folder / stale).unlink(missing_ok=True)
            job = {
                "name": name,
                "library": str(self.library.absolute()),
                "device_lock": str(self.device_lock.absolute()),
                "flags": list(flags),
            }
            write_atomic(folder / "job.json", json.dumps(job))
            # The child inherits the lock, so the job never looks dead in between. Its own session protects it from the
            # signals that end the app (Ctrl-C, a closed terminal).
            with (folder / "output.log").open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "nora_diffusion.ui.jobs.worker", str(folder.absolute())],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, umask=0o077,
                    pass_fds=[alive.handle or 0], cwd=folder, env=_environment(self.device),
                )  # fmt: skip
        finally:
            alive.release()
        threading.Thread(target=process.wait, daemon=True).start()


def _check_system() -> None:
    if os.name == "nt":  # no lock that a child process inherits, and no SIGTERM handler that could save
        raise UserError("training in the app needs Linux or macOS: use nora-diffusion train instead")


def copy_images(images: Sequence[Path], folder: Path) -> None:
    """Copy images, and the captions next to them, into a new ``folder`` for a training."""
    folder.mkdir(mode=0o700)
    for number, image in enumerate(images):
        for file in (image, image.with_suffix(".txt")):
            if file.is_file():  # numbered: two images may have the same name
                shutil.copyfile(file, folder / f"{number:03d}-{_shortened(file.stem)}{file.suffix}")


def _shortened(stem: str) -> str:
    """A file's stem, short enough for a number before it: names have at most 255 bytes."""
    return os.fsencode(stem)[:MAX_STEM_BYTES].decode(errors="ignore")


def _environment(device: str | None) -> dict[str, str]:
    """The app's environment, without progress bars, with this package on the path and accelerate on ``device``."""
    folders = [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
    accelerate = {"ACCELERATE_TORCH_DEVICE": device} if device else {}
    if device == "cpu":  # otherwise accelerate chooses settings for a GPU
        accelerate["ACCELERATE_USE_CPU"] = "true"
    return {**os.environ, **accelerate, "TQDM_DISABLE": "1", "PYTHONPATH": os.pathsep.join(filter(None, folders))}


def _check(values: Mapping[str, Any]) -> None:
    from ...training import TrainConfig
    from ...training.settings.checks import check_config

    check_config(TrainConfig.from_mapping(values))


def _pid(folder: Path) -> int:
    """The pid of a running job, which the process writes right after its start."""
    until = time.monotonic() + START_PATIENCE
    while (pid := number_in(read_json(folder / "process.json"), "pid") or 0) <= 1:  # 0 and -1 are groups
        if time.monotonic() > until:
            raise UserError("the training is still starting: try again in a moment")
        time.sleep(0.05)
    return int(pid)
