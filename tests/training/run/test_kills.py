"""The proof of a resume: killed at every step, in the middle of an accumulation and at every write, fsync and rename.

A forked child really dies by SIGKILL, half of a write done; the parent lets the run go on and compares it, bit for bit,
with one that was never killed: weights, optimizer state, schedule and logged losses.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import Configure, assert_same_run

from nora_diffusion import open_pipeline
from nora_diffusion.io import files
from nora_diffusion.io.run_layout import checkpoint_steps
from nora_diffusion.training import TrainConfig, train
from nora_diffusion.training.planning import opening, rundir
from nora_diffusion.training.planning.checkpoints import read_checkpoint
from nora_diffusion.training.run.steps import Stepper
from nora_diffusion.training.run.updates import Updates

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
STEPS = 3
Forked = Callable[..., int]


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
    """``forked(config, kill_at)``: train in a child; returns the number of events, or minus the signal it died by."""
    pipe = open_pipeline(tiny_base)  # loaded once: a fork has its own copy
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(opening, "open_pipeline", lambda *_, **__: pipe)
    monkeypatch.setattr(rundir, "STATE_SECONDS", 0)  # or the clock decides how many events there are

    def run(config: TrainConfig, kill_at: int | None = None) -> int:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                events = Events(kill_at)
                events.arm()
                train(config)
                os.write(writer, json.dumps(events.count).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe_end:
            said = pipe_end.read()
        _, status = os.waitpid(child, 0)
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else int(said or b"0")

    return run


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
