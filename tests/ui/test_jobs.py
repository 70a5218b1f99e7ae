"""Training jobs: separate processes that are found again, stopped and resumed, and never reported as done too early."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from factories import write_photos
from forks import run_in_fork

from nora_diffusion import UserError, inspect_adapter
from nora_diffusion.formats.adapter_file import FILE_NAME
from nora_diffusion.io.files import FileLock
from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.ui.config import AppConfig
from nora_diffusion.ui.jobs.job import Job, boot_id, read_job
from nora_diffusion.ui.jobs.jobs import Jobs, copy_images
from nora_diffusion.ui.jobs.sample_scores import SampleScores
from nora_diffusion.ui.state import App
from nora_diffusion.ui.tabs.train_view import curves, label, run_status

from .conftest import LONG, until


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path / "jobs", tmp_path / "library", tmp_path / "device.lock")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = write_photos(tmp_path_factory.mktemp("photos"), 2)
    (folder / "0.txt").write_text("a photo of sks dog in the snow")
    return sorted(folder.glob("*.png"))


@pytest.fixture
def settings(tiny_base: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": str(tiny_base), "instance_prompt": "a photo of sks dog", "rank": 4,
        "inner_rank": 2, "basis": "svd", "train_batch_size": 1, "max_train_steps": 3, "seed": 1, "sample_steps": 1,
        "mixed_precision": "no", "validation_prompt": "a sks dog", "num_validation_images": 1, "validation_steps": 2,
        "use_captions": True,
    }  # fmt: skip


def finished(jobs: Jobs, identity: str) -> Job:
    until(lambda: not jobs.get(identity).running, LONG)
    return jobs.get(identity)


def fake(folder: Path, **files: Any) -> Path:
    """A job's folder with the files of a finished or running process."""
    (folder / "run").mkdir(parents=True)
    (folder / "alive.lock").touch()
    for name, value in {"job": {"name": "dog"}, **files}.items():
        file = folder / "run" / "state.json" if name == "state" else folder / f"{name}.json"
        file.write_text(json.dumps(value))
    return folder


# Reading a folder


def test_the_status_follows_from_the_files(tmp_path: Path) -> None:
    process = {"boot": boot_id(), "pid": os.getpid()}
    training = {"status": "training", "pid": os.getpid(), "total": 9}
    killed = read_job(fake(tmp_path / "killed", process=process, state=training))
    assert killed.status == "killed" and "memory" in killed.message
    rebooted = read_job(fake(tmp_path / "rebooted", process={**process, "boot": "earlier"}, state=training))
    assert rebooted.status == "killed" and "restarted" in rebooted.message
    # A state of "done" is not enough: the process must have exited with code 0.
    assert read_job(fake(tmp_path / "a", process=process, state={**training, "status": "done"})).status == "killed"
    assert read_job(fake(tmp_path / "b", process=process, exit={"code": 143, "message": ""})).status == "stopped"
    failed = fake(tmp_path / "c", process=process, exit={"code": 2, "message": ""})
    (failed / "output.log").write_text("a remark\nerror: no photos here\n")
    assert (read_job(failed).status, read_job(failed).message) == ("failed", "no photos here")
    # Out of memory: the message has no flags and no folders, and the run can be resumed.
    (failed / "output.log").write_text(f"error: out of memory: lower --train_batch_size; {tmp_path}/c/run is kept\n")
    (failed / "run" / "checkpoints" / "step-7").mkdir(parents=True)
    (failed / "run" / "checkpoints" / "step-7" / "manifest.json").write_text("{}")
    assert read_job(failed).message == "out of memory: lower train_batch_size; run is kept"
    assert read_job(failed).resumable and read_job(failed).checkpoint == 7


ODD: tuple[Any, ...] = (
    None, "x", "", -1, 10**400, 1e400, float("nan"), float("-inf"), True, [], [[]], {}, {"a": {}}, "\ud83d", "\0", 0.5,
)  # fmt: skip
KEYS = {
    "job": ("name",),
    "process": ("pid", "boot", "waiting"),
    "exit": ("code", "message", "adapter"),
    "state": ("status", "pid", "total", "step", "message", "loss"),
    "log": ("step", "loss", "seconds"),
}


@pytest.mark.parametrize("file", KEYS)
def test_an_odd_value_in_one_job_hides_no_training(file: str, jobs: Jobs) -> None:
    """Every job is listed and can be removed, whatever one value of it is."""
    fake(jobs.root / "good", exit={"code": 0, "message": "", "adapter": "/library/dog"})
    for key in KEYS[file]:
        for number, odd in enumerate(ODD):
            for alive in (False, True):
                good: dict[str, dict[str, Any]] = {
                    "job": {"name": "dog"},
                    "process": {"pid": 2, "boot": boot_id()},
                    "state": {"status": "training", "pid": 2, "total": 9},
                    **({} if alive else {"exit": {"code": 2, "message": "x"}}),
                }
                if file in good:
                    good[file] = {**good[file], key: odd}
                folder = fake(jobs.root / f"odd-{key}-{number}-{alive}", **good)
                row = {"step": 3, "loss": 0.5, "seconds": 1.0}
                rows = [row, {**row, key: odd} if file == "log" else row]
                (folder / "run" / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
                lock = FileLock(folder / "alive.lock")
                assert not alive or lock.try_acquire()
                found = jobs.list()
                lock.release()
                assert {job.id for job in found} == {"good", folder.name}, (key, odd)
                job = next(job for job in found if job.id == folder.name)
                json.dumps([job.name, job.message, job.step, job.total, job.eta, job.losses], allow_nan=False)
                str(job.adapter).encode(errors="backslashreplace")
                for shown in (run_status(job), label(job), curves(job, None)):
                    assert shown.encode()
                assert job.running == alive
                jobs.remove(folder.name)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}"])
def test_a_file_that_is_no_json_hides_no_training(content: bytes, jobs: Jobs) -> None:
    fake(jobs.root / "good", exit={"code": 0, "message": ""})
    names = ("job.json", "process.json", "exit.json", "scores.json", "output.log", "run/state.json", "run/log.jsonl")
    for name in names:
        folder = fake(jobs.root / "odd", process={"pid": 2}, exit={"code": 2, "message": ""})
        (folder / name).write_bytes(content)
        (folder / "run" / "samples").mkdir()
        (folder / "run" / "samples" / f"step-{'9' * 200}-1.png").write_bytes(content)
        (folder / "run" / "checkpoints" / "step-x").mkdir(parents=True)
        (folder / "run" / "checkpoints" / f"step-{'9' * 200}").mkdir()
        assert {job.id for job in jobs.list()} == {"good", "odd"}, name
        assert SampleScores()._known(jobs.get("good")) == {}
        jobs.remove("odd")
    for name in names[1:]:  # folders in their place
        folder = fake(jobs.root / "odd")
        (folder / name).mkdir()
        assert {job.id for job in jobs.list()} == {"good", "odd"}, name
        jobs.remove("odd")


def test_odd_requests_hide_no_trigger(jobs: Jobs) -> None:
    for number, text in enumerate(
        ("trigger: 007", "[" * 5000, "\ud83d", "a: &a [1]\nb: *a\ntrigger: sks", "- 1", "a: {")
    ):
        (jobs.root / str(number)).mkdir(parents=True)
        (jobs.root / str(number) / "request.yaml").write_bytes(text.encode(errors="surrogatepass"))
    (jobs.root / "folder" / "request.yaml").mkdir(parents=True)
    assert jobs.triggers() == {"007", "sks"}


def test_names_of_any_length_are_copied_with_their_captions(tmp_path: Path) -> None:
    """The number before a name of 255 bytes would make it too long."""
    names = ["x" * 251, "ü" * 124 + "abc", os.fsdecode(b"\xff" * 251), "short"]
    (tmp_path / "from").mkdir()
    for name in names:
        (tmp_path / "from" / f"{name}.jpg").write_bytes(b"image")
        (tmp_path / "from" / f"{name}.txt").write_text("a dog")
    copy_images([tmp_path / "from" / f"{name}.jpg" for name in names], tmp_path / "to")
    copies = sorted(path.name for path in (tmp_path / "to").iterdir())
    assert len(copies) == 8 and len({name.rpartition(".")[0] for name in copies}) == 4
    assert copies[-2:] == ["003-short.jpg", "003-short.txt"]


@pytest.mark.parametrize("pid", [None, "x", 0, 1, -1, 1e400, True, []])
def test_only_a_process_of_its_own_is_signaled(pid: Any, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals to 0 and -1 reach whole groups of processes."""
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("signaled"))
    monkeypatch.setattr("nora_diffusion.ui.jobs.jobs.START_PATIENCE", 0.0)
    folder = fake(jobs.root / "odd", process={"pid": pid})
    with FileLock(folder / "alive.lock"), pytest.raises(UserError, match="still starting"):
        jobs.stop("odd")


def test_only_the_lock_shows_that_a_process_is_alive(tmp_path: Path) -> None:
    pid, other = os.getpid(), os.getpid() + 1
    state = {"status": "training", "pid": pid, "total": 4}
    folder = fake(tmp_path / "job", process={"pid": pid, "boot": ""}, state=state)
    rows = [{"step": step, "loss": 1.0, "seconds": 2.0} for step in (1, 2)]
    (folder / "run" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo')
    assert read_job(folder).status == "killed"  # although a process with this pid is alive: this test
    with FileLock(folder / "alive.lock"):
        job = read_job(folder)
        assert (job.status, job.step, job.total, job.eta) == ("training", 2, 4, 4.0)
        (folder / "process.json").write_text(json.dumps({"pid": other, "boot": ""}))
        assert read_job(folder).status == "starting"  # an earlier process wrote the state
        (folder / "process.json").write_text(json.dumps({"pid": other, "boot": "", "waiting": True}))
        assert read_job(folder).status == "waiting"
        (folder / "process.json").unlink()
        assert read_job(folder).status == "starting"


def test_long_curves_are_thinned_to_means(tmp_path: Path) -> None:
    folder = fake(tmp_path / "job")
    lines = [json.dumps({"step": step, "loss": float(step), "seconds": 0.1}) for step in range(1, 1001)]
    (folder / "run" / "log.jsonl").write_text("\n".join(lines))
    losses = read_job(folder).losses
    assert len(losses) <= 400 and losses[0] == (3, 2.0) and losses[-1][0] == 1000


# Refusals


@pytest.mark.parametrize("identity", ["", "../jobs", "/etc", "a/b", "nothing", "x\0y", ".."])
def test_an_id_is_not_a_path(jobs: Jobs, identity: str) -> None:
    fake(jobs.root / "real")
    for action in (jobs.get, jobs.stop, jobs.resume, jobs.remove):
        with pytest.raises(UserError, match="no such training"):
            action(identity)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [("../dog", {}, "name"), ("dog", {"rank": -1}, "rank"), ("dog", {"rnak": 4}, "rnak"), ("", {}, "name")],
)
def test_invalid_settings_write_nothing(
    jobs: Jobs, settings: dict[str, Any], photos: list[Path], name: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        jobs.start(name, {**settings, **change}, photos)
    assert not jobs.root.exists()


@pytest.mark.parametrize(("device", "found"), [("cpu", "cpu True"), ("meta", "meta False")])
def test_trainings_use_the_device_of_the_app(
    settings: dict[str, Any], photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str,
    found: str,
) -> None:  # fmt: skip
    app = App(AppConfig(BaseSource(device=device), library=str(tmp_path / "library")), tmp_path)
    started: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", lambda words, **how: started.update(how) or SimpleNamespace(wait=int))
        app.jobs.start("dog", settings, photos)
    code = "from accelerate import Accelerator as A; print(A().device, A().state._cpu)"
    process = subprocess.run([sys.executable, "-c", code], env=started["env"], capture_output=True, text=True)
    assert process.stdout.strip() == found, process.stderr


def test_windows_is_refused_before_anything_is_copied(
    jobs: Jobs, settings: dict[str, Any], photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        with pytest.raises(UserError, match="Linux or macOS"):
            jobs.start("dog", settings, photos)
        with pytest.raises(UserError, match="Linux or macOS"):
            jobs.resume("20260101-000000-abc")
    assert not jobs.root.exists()


# Real processes


@pytest.mark.slow
def test_a_job_from_start_to_library(jobs: Jobs, settings: dict[str, Any], photos: list[Path]) -> None:
    identity = jobs.start("dog", settings, photos)
    assert jobs.get(identity).running
    with pytest.raises(UserError, match="running"):
        jobs.remove(identity)
    job = finished(jobs, identity)
    assert job.status == "done", (job.message, (job.folder / "output.log").read_text())
    assert (job.step, job.total, len(job.losses)) == (3, 3, 3)
    assert [s.name for s in job.samples] == [f"step-00000{n}-0.png" for n in (0, 2, 3)]
    assert job.adapter == jobs.library / "dog"
    assert inspect_adapter(job.adapter).sha256 == inspect_adapter(job.folder / "run").sha256
    assert (job.adapter / "thumbnail.png").read_bytes() == job.samples[-1].read_bytes()
    assert "in the snow" in inspect_adapter(job.adapter).prompts[0]
    # A new page and a restarted app find it again.
    assert Jobs(jobs.root, jobs.library, jobs.device_lock).list() == [job]
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        jobs.resume(identity)
    # A second job of the same name gets an unused name and replaces nothing.
    second = finished(jobs, jobs.start("dog", {**settings, "max_train_steps": 1}, photos))
    assert second.adapter == jobs.library / "dog-2" and inspect_adapter(job.adapter).step == 3
    jobs.remove(identity)
    assert [j.id for j in jobs.list()] == [second.id] and (job.adapter / FILE_NAME).is_file()


@pytest.mark.slow
def test_stop_saves_and_resume_continues(jobs: Jobs, settings: dict[str, Any], photos: list[Path]) -> None:
    settings |= {"max_train_steps": 100_000, "lr_scheduler": "constant", "validation_steps": 1_000_000}
    identity = jobs.start("dog", settings, photos)
    until(lambda: jobs.get(identity).step > 0, LONG)
    jobs.stop(identity)
    jobs.stop(identity)  # a second click loses nothing
    job = finished(jobs, identity)
    assert job.status == "stopped" and job.resumable and job.checkpoint == job.step and job.adapter is None
    assert not jobs.library.exists()
    assert jobs.resume(identity) == job.checkpoint
    until(lambda: jobs.get(identity).step > job.step, LONG)
    # Killed by the system: reported as such, and the checkpoint is still there.
    os.kill(json.loads((job.folder / "process.json").read_text())["pid"], signal.SIGKILL)
    killed = finished(jobs, identity)
    assert killed.status == "killed" and killed.resumable and killed.checkpoint == job.checkpoint


@pytest.mark.slow
def test_a_job_outlives_the_app_and_waits_for_the_device(
    jobs: Jobs, settings: dict[str, Any], photos: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "start.json").write_text(json.dumps([str(jobs.root), settings, [str(p) for p in photos]]))
    code = (
        "import json, os, signal, sys; from pathlib import Path; from nora_diffusion.ui.jobs.jobs import Jobs\n"
        "root, settings, photos = json.loads(Path(sys.argv[1]).read_text()); root = Path(root)\n"
        "jobs = Jobs(root, root.parent / 'library', root.parent / 'device.lock')\n"
        "print(jobs.start('dog', settings, [Path(p) for p in photos]), flush=True)\n"
        "os.killpg(os.getpgrp(), signal.SIGKILL)"
    )
    generation = FileLock(jobs.device_lock)
    assert generation.try_acquire()
    app = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "start.json")], stdout=subprocess.PIPE, start_new_session=True
    )
    identity = app.communicate()[0].decode().strip()
    assert app.returncode == -signal.SIGKILL
    until(lambda: jobs.get(identity).status == "waiting", LONG)
    generation.release()
    assert finished(jobs, identity).status == "done"


@pytest.mark.slow
def test_a_job_with_an_unreadable_adapter_is_not_done(
    jobs: Jobs, settings: dict[str, Any], photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nora_diffusion.ui.jobs import worker

    def write_garbage(argv: list[str]) -> int:
        run = folder / "run"
        run.mkdir()
        (run / FILE_NAME).write_bytes(b"\xff" * 100)
        return 0

    monkeypatch.setattr(jobs, "_launch", lambda *_: None)
    folder = jobs.root / jobs.start("dog", settings, photos)
    job = {"name": "dog", "library": str(jobs.library), "device_lock": str(jobs.device_lock), "flags": []}
    (folder / "job.json").write_text(json.dumps(job))
    monkeypatch.setattr("nora_diffusion.training.main", write_garbage)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert worker.main(folder) == worker.UNREADABLE
    finally:
        signal.signal(signal.SIGTERM, before)
    assert jobs.get(folder.name).status == "failed" and "safetensors" in jobs.get(folder.name).message
    assert not jobs.library.exists()


def test_a_stop_right_after_the_start_is_reported(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    from nora_diffusion.ui.jobs import worker

    folder = fake(jobs.root / "20260101-000000-abc")
    job = {"name": "dog", "library": str(jobs.library), "device_lock": str(jobs.device_lock), "flags": []}
    (folder / "job.json").write_text(json.dumps(job))
    write = worker.write_atomic

    def write_and_be_stopped(path: Path, text: str) -> None:
        write(path, text)
        if path.name == "process.json":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(worker, "write_atomic", write_and_be_stopped)
    monkeypatch.setattr("nora_diffusion.training.main", lambda arguments: 0)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # by default the signal would end this test
    try:
        assert worker.main(folder) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert jobs.get(folder.name).status == "stopped"
    assert jobs.get(folder.name).message == "stopped before training began"


def test_a_finished_run_that_did_not_fit_into_the_library_is_not_trained_again(
    jobs: Jobs, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nora_diffusion.ui.jobs import worker

    folder = fake(jobs.root / "20260101-000000-abc", state={"status": "done"})
    shutil.copy(library / "dog" / FILE_NAME, folder / "run")
    job = {"name": "dog", "library": str(jobs.library), "device_lock": str(jobs.device_lock), "flags": []}
    (folder / "job.json").write_text(json.dumps(job))
    (folder / "request.yaml").write_text("pretrained_model_name_or_path: elsewhere\n")
    monkeypatch.setattr("nora_diffusion.training.main", lambda arguments: pytest.fail("trained again"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with monkeypatch.context() as full:
        full.setattr(worker.shutil, "copy2", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert worker.main(folder) == worker.UNREADABLE
    failed = jobs.get(folder.name)
    assert failed.status == "failed" and "No space left" in failed.message
    assert str(jobs.library) not in failed.message
    assert list(jobs.library.iterdir()) == []
    assert worker.main(folder) == 0 and jobs.get(folder.name).status == "done"
    assert inspect_adapter(jobs.library / "dog").sha256 == inspect_adapter(library / "dog").sha256


KILLS = (
    (os, "mkdir"), (os, "rename"), (os, "replace"), (os, "fsync"), (os, "chmod"), (os, "rmdir"), (shutil, "copy2"),
    (shutil, "rmtree"),
)  # fmt: skip


def publish_in_a_child(folder: Path, kill_at: int | None = None) -> int:
    """Run a job in a forked child that dies at its ``kill_at``-th change on the disk; returns the number of changes."""
    from nora_diffusion.ui.jobs import worker

    def action() -> int:
        count = 0

        def counted(original: Any) -> Any:
            def change(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return change

        for owner, name in KILLS:
            setattr(owner, name, counted(getattr(owner, name)))
        worker.main(folder)
        return count

    return run_in_fork(action)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_while_publishing_leaves_one_adapter_and_nothing_else(jobs: Jobs, library: Path, tmp_path: Path) -> None:
    """At every change on the disk, up to and after ``exit.json``; another adapter of the same name stays."""
    original = fake(tmp_path / "original", state={"status": "done"})
    shutil.copy(library / "dog" / FILE_NAME, original / "run")
    (original / "request.yaml").write_text("pretrained_model_name_or_path: elsewhere\n")
    job = {"name": "dog", "library": str(jobs.library), "device_lock": str(jobs.device_lock), "flags": []}
    (original / "job.json").write_text(json.dumps(job))

    def started() -> Path:
        shutil.rmtree(jobs.root, ignore_errors=True)
        shutil.rmtree(jobs.library, ignore_errors=True)
        shutil.copytree(library / "dog", jobs.library / "dog")
        return shutil.copytree(original, jobs.root / "20260101-000000-abc")

    changes = publish_in_a_child(started())
    assert changes > 10
    for kill_at in range(1, changes + 1):
        folder = started()
        assert publish_in_a_child(folder, kill_at) == -signal.SIGKILL
        if jobs.get(folder.name).status != "done":
            assert publish_in_a_child(folder) > 0
        assert jobs.get(folder.name).status == "done"
        assert sorted(path.name for path in jobs.library.iterdir()) == ["dog", "dog-2"], kill_at
        assert jobs.get(folder.name).adapter == jobs.library / "dog-2"
        assert inspect_adapter(jobs.library / "dog-2").sha256 == inspect_adapter(library / "dog").sha256
