"""Many subjects on a cluster: no step is lost or trained twice."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from factories import write_photos
from fake_ray import Died, FakeRay
from runs import Configure, distance, flags, journal

from nora_diffusion.errors import UserError
from nora_diffusion.training import TrainConfig, main
from nora_diffusion.training.many import cluster
from nora_diffusion.training.many.cluster import Group, Table, train_on_cluster
from nora_diffusion.training.many.subjects import train_subjects
from nora_diffusion.training.signals import Interrupted

NAMES = ("dog", "cat", "toy", "hat")


@pytest.fixture
def listed(configure: Configure, tmp_path: Path) -> Configure:
    """``listed(key=value)``: a config of four subjects, two per task."""
    entries = [
        {"instance_data_dir": str(write_photos(tmp_path / name, 2, seed=n)), "instance_prompt": f"sks {name}"}
        for n, name in enumerate(NAMES)
    ]
    path = tmp_path / "subjects.yaml"
    path.write_text(yaml.safe_dump(entries))

    def build(**changes: Any) -> TrainConfig:
        values = {"subjects": str(path), "instance_data_dir": None, "instance_prompt": None, "engine": "ray"}
        return configure(**{**values, "subjects_per_task": 2, "checkpointing_steps": 1, **changes})

    return build


class InOneProcess(FakeRay):
    """Trains a task's group in this process; the first killed one has trained two steps."""

    def get(self, task: int) -> str:
        settings, names, place = self.started[task - 1]
        if task in self.dies:
            if task == min(self.dies):
                cluster.train_group({**settings, "max_train_steps": 2}, names, place)
            raise Died
        return cluster.train_group(settings, names, place)


def test_a_killed_task_goes_on_and_a_finished_one_is_left_alone(
    listed: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    fake = InOneProcess(dies={1})
    monkeypatch.setitem(sys.modules, "ray", fake)
    assert train_on_cluster(listed(seed=3)) == 0
    assert [(names, settings["resume_from_checkpoint"]) for settings, names, _ in fake.started] == [
        (["dog", "cat"], None), (["toy", "hat"], None), (["dog", "cat"], "latest"),
    ]  # fmt: skip
    table = capsys.readouterr().err.splitlines()[-4:]
    assert [line.split()[:3] + line.split()[-1:] for line in table] == [
        [name, "done", "3/3", tries] for name, tries in zip(NAMES, "2211", strict=True)
    ]
    train_subjects(listed(seed=3, output_dir=str(tmp_path / "here"), engine="local"))
    for name in NAMES:
        assert [row[0] for row in journal(tmp_path / "run" / name)] == [1, 2, 3]
        assert distance(tmp_path / "run" / name, tmp_path / "here" / name) <= 1e-4
    with pytest.raises(UserError, match="holds an earlier run"):
        train_on_cluster(listed(seed=3))
    before = (tmp_path / "run/dog/nora_adapter.safetensors").stat().st_mtime_ns
    assert train_on_cluster(listed(seed=3, resume_from_checkpoint="latest")) == 0
    assert (tmp_path / "run/dog/nora_adapter.safetensors").stat().st_mtime_ns == before


def test_it_gives_up_after_the_retries_and_the_others_go_on(
    listed: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", InOneProcess(dies={1, 3, 4}))
    with pytest.raises(
        UserError, match=r"^dog, cat: killed 3 times, probably because it ran out of memory: use fewer --subjects"
    ):
        train_on_cluster(listed(max_train_steps=2))
    assert (tmp_path / "run/hat/nora_adapter.safetensors").exists()
    assert not (tmp_path / "run/dog/nora_adapter.safetensors").exists() or journal(tmp_path / "run/dog")


class Stopping(InOneProcess):
    """Ctrl-C while the first task runs; the tasks that wait are canceled, and Ray's error for these has no text."""

    def __init__(self, number: int) -> None:
        super().__init__(set())
        self.number, self.canceled = number, set[int]()

    def wait(self, tasks: list[int], timeout: float) -> tuple[list[int], list[int]]:
        if not self.canceled:
            os.kill(os.getpid(), self.number)
        return super().wait(tasks, timeout)

    def cancel(self, task: int) -> None:
        self.canceled.add(task)

    def get(self, task: int) -> str:
        if task in self.canceled:
            raise KeyError
        return super().get(task)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_with_tasks_that_wait_keeps_the_work_of_the_others(
    number: int, code: int, listed: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Stopping(number)
    monkeypatch.setitem(sys.modules, "ray", fake)
    with pytest.raises(Interrupted, match=r"after 3 steps: saved .*--resume_from_checkpoint latest") as stop:
        train_on_cluster(listed(subjects_per_task=1, seed=3))
    assert stop.value.exit_code == code and fake.canceled == {2, 3, 4}
    assert (tmp_path / "run/dog/nora_adapter.safetensors").is_file()
    monkeypatch.setitem(sys.modules, "ray", InOneProcess(set()))
    assert train_on_cluster(listed(subjects_per_task=1, seed=3, resume_from_checkpoint="latest")) == 0
    assert all((tmp_path / "run" / name / "nora_adapter.safetensors").is_file() for name in NAMES)


def break_photo(tmp_path: Path) -> None:
    photo = next((tmp_path / "cat").glob("*.png"))
    photo.write_bytes(photo.read_bytes()[:60])


def break_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/cat").write_text("a file in the way")


def break_lock(tmp_path: Path) -> None:
    (tmp_path / "run/cat/.lock").mkdir(parents=True)
    (tmp_path / "run/cat/README.md").write_text("not of a run")


def break_prompt(tmp_path: Path) -> None:
    path = tmp_path / "subjects.yaml"
    entries = yaml.safe_load(path.read_text())
    entries[1] |= {"class_labels_conditioning": "timesteps", "target_blocks": ["no_such_block"]}
    path.write_text(yaml.safe_dump(entries))


def break_start(tmp_path: Path) -> None:
    """A class image that cannot be read is found only when the data are encoded."""
    path = tmp_path / "subjects.yaml"
    entries = yaml.safe_load(path.read_text())
    (tmp_path / "class of cat").mkdir()
    (tmp_path / "class of cat/0.png").write_bytes(b"not an image")
    entries[1] |= {"with_prior_preservation": True, "class_prompt": "a cat", "num_class_images": 1}
    path.write_text(yaml.safe_dump([{**e, "class_data_dir": str(tmp_path / "class of cat")} for e in entries]))


@pytest.mark.parametrize("breaks", [break_photo, break_folder, break_lock, break_prompt, break_start])
def test_a_subject_that_cannot_start_does_not_stop_the_others_of_its_task(
    breaks: Any, listed: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = listed(subjects_per_task=4, seed=3)
    breaks(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", InOneProcess(set()))
    with pytest.raises(UserError, match=r"^dog, cat, toy, hat: cat: .*; 3 other subjects were trained$"):
        train_on_cluster(config)
    assert [(tmp_path / "run" / name / "nora_adapter.safetensors").is_file() for name in NAMES] == [
        True, False, True, True,
    ]  # fmt: skip


def test_mistakes_are_sentences(listed: Configure, monkeypatch: pytest.MonkeyPatch, photos: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"needs the package ray: pip install 'nora-diffusion\[ray\]'"):
        train_on_cluster(listed())
    with pytest.raises(UserError, match="choose another --output_dir"):
        train_on_cluster(listed(overwrite_output_dir=True))
    assert main(["--engine", "ray", "--instance_data_dir", str(photos)]) == 2


def test_a_cluster_that_is_not_there(listed: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**given: Any) -> None:
        raise Exception(f"The current node timed out during startup. {given['address']}")

    fake = SimpleNamespace(is_initialized=lambda: False, init=init, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", fake)
    with pytest.raises(UserError, match="no Ray cluster at --address auto: The current node timed out"):
        train_on_cluster(listed(address="auto"))
    with pytest.raises(UserError, match=r"no Ray cluster on this machine: .*start one with `ray start --head`"):
        train_on_cluster(listed())


def test_the_table_reads_the_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, state in (("dog", {"status": "training", "step": 7, "total": 20, "loss": 0.25}), ("cat", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text(json.dumps(state) if state else "{half")
    table = Table(tmp_path)
    table.show([Group(["dog"], tries=1), Group(["cat"])])
    table.show([Group(["dog"], tries=1), Group(["cat"])])  # nothing has changed
    assert capsys.readouterr().err.splitlines() == [
        "subject  state     step  loss    starts",
        "dog      training  7/20  0.2500  1",
        "cat      waiting   0/?           0",
    ]
    table.show([Group(["dog"], tries=2), Group(["cat"])])
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["subject", "dog"]


@pytest.fixture(scope="module")
def two_workers() -> Iterator[Any]:
    """A real Ray on this machine that runs two tasks at a time."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    paths = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[3])])
    environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield ray
    ray.shutdown()


def when(condition: Any, then: Any) -> threading.Thread:
    """Call a function in a thread once a condition holds."""

    def watch() -> None:
        end = time.monotonic() + 600
        while not condition():
            if time.monotonic() > end:
                return
            time.sleep(0.01)
        then()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_worker_is_killed_in_the_middle(
    two_workers: Any, listed: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL one of two workers: each subject trains every step once; the other group is started once."""

    def dying(settings: Any, names: Any, place: Any) -> str:
        import os
        import signal

        from nora_diffusion.training.many.cluster import train_group
        from nora_diffusion.training.run.journal import Journal

        original = Journal.record

        def record(self: Any, done: int, *rest: Any) -> None:
            original(self, done, *rest)
            left = self.folder.path.parent / "killed"
            if self.folder.path.name == "toy" and done == 8 and not left.exists():
                found = self.folder.checkpoints.glob("*/manifest.json")
                left.write_text("\n".join(f"{path} {path.stat().st_mtime_ns}" for path in found))
                os.kill(os.getpid(), signal.SIGKILL)

        Journal.record = record  # type: ignore[method-assign]
        try:
            return train_group(settings, names, place)
        finally:
            Journal.record = original  # type: ignore[method-assign]

    monkeypatch.setattr(cluster, "train_group", dying)
    starts: list[list[str]] = []
    start = cluster._start
    monkeypatch.setattr(cluster, "_start", lambda *given: starts.append(given[2].names) or start(*given))
    steps, run = 20, tmp_path / "run"
    assert train_on_cluster(listed(max_train_steps=steps, checkpointing_steps=5, seed=3)) == 0
    assert sorted(starts) == [["dog", "cat"], ["toy", "hat"], ["toy", "hat"]]
    (line,) = (run / "killed").read_text().splitlines()
    path, written = line.split()
    assert path.endswith("step-5/manifest.json") and Path(path).stat().st_mtime_ns == int(written)  # not done again
    train_subjects(listed(max_train_steps=steps, seed=3, output_dir=str(tmp_path / "here"), engine="local"))
    for name in NAMES:
        assert [row[0] for row in journal(run / name)] == [*range(1, steps + 1)]
        assert json.loads((run / name / "state.json").read_text())["status"] == "done"
        assert distance(run / name, tmp_path / "here" / name) <= 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_in_running_tasks_while_others_wait(
    number: int, code: int, two_workers: Any, listed: Configure, tmp_path: Path
) -> None:
    """Four tasks for two CPUs."""
    run = tmp_path / "run"
    config = listed(max_train_steps=100_000, checkpointing_steps=100_000, subjects_per_task=1)
    thread = when(
        lambda: sum(log.stat().st_size > 0 for log in run.glob("*/log.jsonl")) == 2,
        lambda: os.kill(os.getpid(), number),
    )
    with pytest.raises(Interrupted, match="--resume_from_checkpoint latest") as stop:
        train_on_cluster(config)
    thread.join()
    assert stop.value.exit_code == code
    assert len(list(run.glob("*/checkpoints/step-*"))) == 2


@pytest.mark.slow
def test_ctrl_c_saves_in_all_tasks_and_the_same_command_goes_on(
    two_workers: Any, listed: Configure, tmp_path: Path
) -> None:
    config = listed(max_train_steps=100_000, checkpointing_steps=100_000)
    logs = [tmp_path / "run" / name / "log.jsonl" for name in ("dog", "toy")]  # the first of each task

    def stepped() -> bool:
        return all(log.exists() and log.stat().st_size for log in logs)

    thread = when(stepped, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match="--resume_from_checkpoint latest") as stop:
        train_on_cluster(config)
    thread.join()
    assert stop.value.exit_code == 130
    states = [json.loads((tmp_path / "run" / name / "state.json").read_text()) for name in NAMES]
    for name, state in zip(NAMES, states, strict=True):
        assert state["status"] == "interrupted" and 0 < state["step"] < 100_000
        assert (tmp_path / "run" / name / f"checkpoints/step-{state['step']}").is_dir()
    total = max(state["step"] for state in states) + 2
    assert main(flags(listed(max_train_steps=total, resume_from_checkpoint="latest"))) == 0
    for name in NAMES:
        assert [row[0] for row in journal(tmp_path / "run" / name)] == [*range(1, total + 1)]
