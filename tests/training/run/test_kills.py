"""The proof of a resume: killed at every step, in the middle of an accumulation and at every write, fsync and rename,
and at the awkward moments: in the last measurement, while the result is saved, and between the subjects of a list.

A forked child really dies by SIGKILL, half of a write done; the parent lets the run go on and compares it, bit for bit,
with one that was never killed: weights, optimizer state, schedule and logged losses.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from factories import tiny_clip, write_photos
from forks import run_in_fork
from runs import Configure, assert_equal_tensors, assert_same_run, factors, journal

from nora_diffusion import open_pipeline
from nora_diffusion.io import files
from nora_diffusion.io.images import load_image
from nora_diffusion.io.run_layout import checkpoint_steps
from nora_diffusion.training import TrainConfig, check, train
from nora_diffusion.training.many import subjects
from nora_diffusion.training.many.subjects import check_subjects, train_subjects
from nora_diffusion.training.measuring import selection, validation
from nora_diffusion.training.measuring.validation import Validation
from nora_diffusion.training.planning import opening, rundir
from nora_diffusion.training.planning.checkpoints import read_checkpoint
from nora_diffusion.training.run import run, saving, steps
from nora_diffusion.training.run import train as run_train
from nora_diffusion.training.run.steps import Stepper
from nora_diffusion.training.run.updates import Updates

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
STEPS = 3
Forked = Callable[..., int]


@dataclass(frozen=True)
class Call:
    """The moment before (or ``after``) the ``number``-th call of a function, at which a process dies."""

    owner: Any
    name: str
    number: int = 1
    after: bool = False

    def arm(self) -> None:
        original, calls = getattr(self.owner, self.name), itertools.count(1)

        def dying(*args: Any, **kwargs: Any) -> Any:
            is_it = next(calls) == self.number
            if is_it and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if is_it:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(self.owner, self.name, dying)


class Events:
    """Counts the moments at which a process may die, and dies at the one that is asked for."""

    def __init__(self, last: int | None) -> None:
        self.last, self.count = last, 0

    def __call__(self, before_dying: Callable[[], object] = lambda: None) -> None:
        self.count += 1
        if self.count == self.last:
            before_dying()
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self()
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    def arm(self) -> None:
        for owner, name in (
            (os, "fsync"), (os, "replace"), (os, "unlink"), (shutil, "rmtree"), (Stepper, "loss"), (Updates, "_update"),
        ):  # fmt: skip
            self.wrap(owner, name)
        original = os.fdopen
        events = self

        def fdopen(handle: int, *args: Any, **kwargs: Any) -> Any:
            file = original(handle, *args, **kwargs)

            class Torn:
                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *_: object) -> None:
                    file.close()

                def write(self, content: bytes) -> None:
                    events(lambda: (file.write(content[: len(content) // 2]), file.flush()))
                    file.write(content)

                def __getattr__(self, name: str) -> Any:
                    return getattr(file, name)

            return Torn()

        files.os.fdopen = fdopen  # type: ignore[attr-defined]


@pytest.fixture
def forked(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Forked:
    """``forked(config, kill_at)``: train in a child; returns the number of events, or minus the signal it died by.

    ``kill_at``: the number of the event at which it dies, or a :class:`Call`.
    """
    pipe = open_pipeline(tiny_base)  # loaded once: a fork has its own copy
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(opening, "open_pipeline", lambda *_, **__: pipe)
    monkeypatch.setattr(rundir, "STATE_SECONDS", 0)  # or the clock decides how many events there are

    def run(config: TrainConfig, kill_at: int | Call | None = None) -> int:
        def action() -> int:
            events = Events(kill_at if isinstance(kill_at, int) else None)
            events.arm()
            if isinstance(kill_at, Call):
                kill_at.arm()
            train_subjects(config) if config.subjects else train(config)
            return events.count

        return run_in_fork(action)

    return run


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the runs that are never killed, with which several tests compare."""
    return tmp_path_factory.mktemp("kept")


def whole_run(folder: Path, build: Callable[..., TrainConfig], forked: Forked, **changes: Any) -> Path:
    """``folder`` with the run of ``build("whole", **changes)``; trained by the first call."""
    config = build("whole", output_dir=str(folder), **changes)
    if not folder.exists():
        check_subjects(config) if config.subjects else check(config)  # estimates memory, which takes as long as the run
        assert forked(config) > 0
    return folder


@pytest.fixture
def nano(configure: Configure, tmp_path: Path) -> Callable[..., TrainConfig]:
    def build(name: str, **changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "output_dir": str(tmp_path / name), "max_train_steps": STEPS, "gradient_accumulation_steps": 2,
            "train_batch_size": 1, "checkpointing_steps": 1, "checkpoints_total_limit": 1, "dropout": 0.2,
            "target_blocks": ["mid_block"], "resolution": 16, "lr_scheduler": "cosine", "lr_warmup_steps": 1,
        }  # fmt: skip
        return configure(**{**values, **changes})

    return build


def check_every(step: int, offset: int, nano: Callable[..., TrainConfig], forked: Forked) -> int:
    check(nano("first"))  # estimates memory, which takes as long as the run
    forked(nano("first"))  # fills the caches: their writes are no events of the runs below
    whole = nano("whole")
    count = forked(whole)
    assert count > 20 * STEPS
    for kill_at in range(1 + offset, count + 1, step):
        config = nano(f"killed{kill_at}")
        assert forked(config, kill_at) == -signal.SIGKILL
        for path in checkpoint_steps(config.folder / "checkpoints").values():
            assert read_checkpoint(path).step > 0  # whole, or not there
        again = nano(f"killed{kill_at}", resume_from_checkpoint="latest", overwrite_output_dir=True)
        assert forked(again) > 0, f"the run that was killed at event {kill_at} did not go on"
        assert_same_run(whole.folder, config.folder, STEPS)
        left = sorted(path.name for path in (config.folder / "checkpoints").iterdir())
        assert left == [f"step-{STEPS}"], f"killed at event {kill_at}"
        shutil.rmtree(config.folder)
    return count


def test_killed_here_and_there(nano: Callable[..., TrainConfig], forked: Forked) -> None:
    check_every(13, 4, nano, forked)


@pytest.mark.slow
def test_killed_at_every_event(nano: Callable[..., TrainConfig], forked: Forked) -> None:
    check_every(1, 0, nano, forked)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_stops_at_once(
    number: int, nano: Callable[..., TrainConfig], forked: Forked, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Updates._update

    def twice(self: Stepper, step: int) -> Any:
        if step == 1:
            for _ in range(2):
                os.kill(os.getpid(), number)
        return original(self, step)

    monkeypatch.setattr(Updates, "_update", twice)
    config = nano("twice")
    assert forked(config) == -number
    assert list(checkpoint_steps(config.folder / "checkpoints")) == [1]


MEASUREMENTS = 3  # at steps 0, 2 and 3 of the runs below
LATE: dict[str, Call] = {
    "before the last step is measured": Call(Validation, "measure_step", MEASUREMENTS),
    "in the last measurement": Call(Validation, "_scores", MEASUREMENTS),
    "measured, and not written": Call(Validation, "_write", MEASUREMENTS),
    "written, and candidates not pruned": Call(Validation, "_prune", MEASUREMENTS),
    "a candidate half written": Call(validation, "save_adapter", MEASUREMENTS - 1),
    "in the last samples": Call(steps, "save_samples", MEASUREMENTS),
    "last checkpoint, nothing else": Call(Stepper, "measure", STEPS + 1),
    "trained, and not saved": Call(run_train, "conclude"),
    "before the adapter": Call(saving, "save_adapter"),
    "after the adapter": Call(saving, "save_adapter", after=True),
    "after the exports": Call(saving, "export_all", after=True),
    "before the report": Call(saving, "write_report"),
    "all but the last word": Call(Stepper, "end", after=True),
}


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP model."""
    folder = tmp_path_factory.mktemp("judge")
    tiny_clip(folder / "clip")
    return folder / "clip"


@pytest.fixture
def measured(nano: Callable[..., TrainConfig], judge: Path) -> Callable[..., TrainConfig]:
    """Runs that are measured at steps 0, 2 and 3, with samples and an export."""

    def build(name: str, **changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "judge": str(judge), "validation_steps": 2, "validation_prompts": ["{}"], "validation_prompt": "a sks dog",
            "export": ["peft"], "learning_rate": 0.1, "ema_decay": 0.5,
        }  # fmt: skip
        return nano(name, **{**values, **changes})

    return build


def assert_same_result(one: Path, other: Path, last: int = STEPS) -> None:
    """The run, what was measured, which steps are kept and every file of the result are the same."""
    assert_same_run(one, other, last)
    first, second = (json.loads((folder / "validation.json").read_text()) for folder in (one, other))
    assert first == second and first["points"][-1]["step"] == last

    def files(folder: Path) -> list[str]:
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    assert files(one) == files(other)
    for name in files(one):
        if name.endswith(".safetensors"):
            assert_equal_tensors(one / name, other / name)
        if name.endswith(".png"):
            assert load_image(one / name).tobytes() == load_image(other / name).tobytes()
    for folder in (one, other):
        assert json.loads((folder / "state.json").read_text())["status"] == "done"


@pytest.mark.parametrize("moment", LATE.values(), ids=LATE.keys())
def test_killed_when_all_steps_are_done(
    moment: Call, measured: Callable[..., TrainConfig], forked: Forked, kept: Path, tmp_path: Path
) -> None:
    whole = whole_run(kept / "measured", measured, forked)
    assert forked(measured("killed"), moment) == -signal.SIGKILL
    assert forked(measured("killed", resume_from_checkpoint="latest")) > 0
    assert_same_result(whole, tmp_path / "killed")


@pytest.mark.parametrize("moment", [LATE["in the last measurement"], Call(Stepper, "save", 3)], ids=["score", "save"])
def test_killed_when_it_stops_early(
    moment: Call,
    measured: Callable[..., TrainConfig],
    forked: Forked,
    kept: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The step at which it stops is measured, and no later one is trained."""
    for module in (selection, validation):
        monkeypatch.setattr(module, "choose", lambda points: 2 if len(points) > 2 else None)
    early = {"early_stopping": 1, "validation_steps": 1, "max_train_steps": 9, "lr_scheduler": "constant"}
    whole = whole_run(kept / "early", measured, forked, **early)
    assert len(journal(whole)) == 3
    assert forked(measured("killed", **early), moment) == -signal.SIGKILL
    assert forked(measured("killed", resume_from_checkpoint="latest", **early)) > 0
    assert_same_result(whole, tmp_path / "killed", 3)


@pytest.fixture
def zoo(configure: Configure, tmp_path: Path) -> Callable[..., TrainConfig]:
    """``zoo(name, key=value)``: three subjects, of which cat ends first and toy accumulates."""
    own: list[dict[str, Any]] = [
        {"instance_prompt": "a photo of sks dog", "seed": 1},
        {"instance_prompt": "a photo of sks cat", "seed": 2, "train_batch_size": 3, "max_train_steps": 3},
        {"instance_prompt": "sks toy", "seed": 3, "gradient_accumulation_steps": 2},
    ]
    for number, (name, values) in enumerate(zip(NAMES, own, strict=True)):
        values["instance_data_dir"] = str(write_photos(tmp_path / f"photos of {name}" / name, 2, seed=number))

    def build(name: str, entries: dict[str, dict[str, Any]] | None = None, **changes: Any) -> TrainConfig:
        path = tmp_path / f"{name}.yaml"
        lines = [{**values, **(entries or {}).get(n, {})} for n, values in zip(NAMES, own, strict=True)]
        path.write_text(yaml.safe_dump(lines))
        values: dict[str, Any] = {
            "instance_data_dir": None, "instance_prompt": None, "seed": None, "subjects": str(path),
            "max_train_steps": 6, "checkpointing_steps": 2, "checkpoints_total_limit": 1,
            "output_dir": str(tmp_path / name),
        }  # fmt: skip
        return configure(**{**values, **changes})

    return build


NAMES = ("dog", "cat", "toy")
BETWEEN: dict[str, Call] = {
    "one has its first checkpoint": Call(run, "write_checkpoint", 2),
    "two have their first checkpoint": Call(run, "write_checkpoint", 3),
    "all have, and nothing is pruned": Call(Stepper, "prune", 4),
    "cat ends, and dog has saved": Call(run, "write_checkpoint", 5),
    "cat ends, and all have saved": Call(subjects, "conclude"),
    "cat has ended": Call(subjects, "conclude", after=True),
    "a step after cat has ended": Call(Updates, "_update", 11),
    "two steps after": Call(Updates, "_update", 12),
    "dog has saved once more": Call(run, "write_checkpoint", 8),
    "in the last step": Call(Updates, "_update", 14),
    "dog has saved its last": Call(run, "write_checkpoint", 10),
    "dog has ended": Call(subjects, "conclude", 2, after=True),
}


def assert_same_subjects(one: Path, other: Path) -> None:
    for name in NAMES:
        assert journal(one / name) == journal(other / name), name
        first, second = factors(one / name), factors(other / name)
        assert first.keys() == second.keys()
        assert all(first[key].equal(second[key]) for key in first), name
        assert_equal_tensors(one / name / "nora_adapter.safetensors", other / name / "nora_adapter.safetensors")
        assert (
            checkpoint_steps(one / name / "checkpoints").keys() == checkpoint_steps(other / name / "checkpoints").keys()
        )
        assert json.loads((other / name / "state.json").read_text())["status"] == "done"


@pytest.mark.parametrize("moment", BETWEEN.values(), ids=BETWEEN.keys())
def test_killed_between_subjects(
    moment: Call, zoo: Callable[..., TrainConfig], forked: Forked, kept: Path, tmp_path: Path
) -> None:
    whole = whole_run(kept / "zoo", zoo, forked)
    assert forked(zoo("killed"), moment) == -signal.SIGKILL
    assert forked(zoo("killed", resume_from_checkpoint="latest")) > 0
    assert_same_subjects(whole, tmp_path / "killed")
