"""The order in which a run calls its hooks, and what it does with what they return."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from factories import write_photos
from runs import Configure, journal
from safetensors.torch import load_file
from torch import Tensor

from nora_diffusion.formats.adapter_writing import Contents, Part
from nora_diffusion.training import train
from nora_diffusion.training.hooks.step_hook import Hooks, State, StepHook
from nora_diffusion.training.hooks.trained import Trained
from nora_diffusion.training.many.batched import BatchedTrainer
from nora_diffusion.training.many.subjects import train_subjects
from nora_diffusion.training.run import run as runs
from nora_diffusion.training.run.updates import Updates


class Recorder(StepHook):
    """Writes down its calls, and adds a penalty on all parameters."""

    name = "recorder"

    def __init__(self, trained: Trained, calls: list[str]) -> None:
        self.trained, self.calls = trained, calls
        self.count = 0

    def start(self) -> None:
        self.calls.append("start")

    def before_step(self, step: int) -> None:
        self.calls.append(f"before {step}")

    @contextmanager
    def around_pass(self, step: int) -> Iterator[None]:
        self.calls.append("(")
        yield
        self.calls.append(")")

    @contextmanager
    def as_saved(self) -> Iterator[None]:
        self.calls.append("[")
        yield
        self.calls.append("]")

    def penalty(self, step: int) -> Tensor | None:
        self.calls.append("penalty")
        return 1e-3 * sum(parameter.square().sum() for parameter in self.trained.parameters.values())  # type: ignore[return-value]

    def after_backward(self, step: int) -> None:
        assert all(parameter.grad is not None for parameter in self.trained.parameters.values())
        self.calls.append("gradients")

    def after_step(self, step: int) -> None:
        self.count += 1
        self.calls.append(f"after {step}")

    def state(self) -> State:
        return {"count": torch.tensor(self.count)}

    def load_state(self, state: State) -> None:
        self.count = int(state["count"])
        self.calls.append(f"load {self.count}")

    def finish(self, contents: Contents) -> Contents:
        self.calls.append("finish")
        return {n: Part(p.config, {k: {f: 2 * v for f, v in o.items()} for k, o in p.layers.items()})
                for n, p in contents.items()}  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of a recorder that every run has."""
    found: list[str] = []
    monkeypatch.setattr(runs, "hooks_of", lambda trained: Hooks([Recorder(trained, found)]))
    return found


def test_calls_of_a_run_and_of_a_resumed_one(calls: list[str], configure: Configure) -> None:
    settings = {"gradient_accumulation_steps": 2, "checkpointing_steps": 1, "validation_prompt": "a dog"}
    settings |= {"validation_steps": 2, "max_train_steps": 2}
    path = train(configure(**settings)).adapter_path
    micro = ["(", "penalty", ")"]
    step = [[f"before {n}", *micro, *micro, "gradients", f"after {n}"] for n in range(3)]
    assert calls == ["start", *["[", "]"], *step[0], *step[1], *["[", "]"], "finish"]
    saved, kept = load_file(path), load_file(path.parent / "checkpoints/step-2/nora_adapter.safetensors")
    trained = [key for key in saved if not key.endswith("_out")]
    assert trained and all(torch.equal(saved[key], 2 * kept[key]) for key in trained)
    calls.clear()
    train(configure(**settings, resume_from_checkpoint=str(path.parent / "checkpoints/step-1")))
    assert calls == ["load 1", *step[1], "[", "]", "finish"]


def test_an_update_that_is_skipped_ends_without_a_call(
    calls: list[str], configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Updates._step_optimizer
    monkeypatch.setattr(Updates, "_step_optimizer", lambda self, n: (original(self, n)[0], n != 1))
    train(configure())
    assert "gradients" in calls and [call for call in calls if call.startswith("after")] == ["after 0", "after 2"]


def test_penalties_count_once_for_each_step(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same photos in every micro-step, accumulation changes nothing but rounding; the logged loss has none."""
    found: list[dict[str, Tensor]] = []

    class Large(StepHook):
        name = "large"

        def __init__(self, trained: Trained) -> None:
            self.parameters = trained.parameters

        def penalty(self, step: int) -> Tensor:
            total: Any = sum(parameter.square().sum() for parameter in self.parameters.values())
            return 1e3 * total

        def after_backward(self, step: int) -> None:
            found.append({name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None})

    monkeypatch.setattr(runs, "hooks_of", lambda trained: Hooks([Large(trained)]))
    losses = []
    for micro in (1, 4):
        settings = {"gradient_accumulation_steps": micro, "max_train_steps": 1, "checkpointing_steps": 1}
        folder = train(configure(**settings, output_dir=str(tmp_path / str(micro)))).adapter_path.parent
        losses.append(journal(folder)[0][1])
    for name, gradient in found[0].items():
        if name.endswith("A_in"):  # the loss has no gradient for it while B_in is zero
            torch.testing.assert_close(gradient, found[1][name])
            assert gradient.any()
    assert max(losses) < 10


def test_state_is_named_by_its_hook() -> None:
    class One(StepHook):
        name = "one"

        def __init__(self) -> None:
            self.loaded: State = {}

        def state(self) -> State:
            return {"a|b": torch.ones(2, 3).t()}

        def load_state(self, state: State) -> None:
            self.loaded = state

    class Two(One):
        name = "two"

    hooks = Hooks([One(), Two()])
    state = hooks.state()
    assert set(state) == {"hook:one|a|b", "hook:two|a|b"} and all(v.is_contiguous() for v in state.values())
    fresh = Hooks([One(), Two()])
    fresh.load_state({**state, "unet.layer.nora_A|exp_avg": torch.zeros(1)})
    assert all(torch.equal(hook.loaded["a|b"], torch.ones(3, 2)) for hook in fresh.hooks)  # type: ignore[attr-defined]


def test_a_hook_without_methods_does_nothing() -> None:
    hooks, loss = Hooks([StepHook()]), torch.ones(())
    with hooks.around_pass(0), hooks.as_saved():
        assert hooks.with_penalties(loss, 0, 0.5) is loss and not hooks.need_own_pass and hooks.state() == {}


@pytest.mark.parametrize("own", [False, True])
def test_subjects_share_passes_unless_a_hook_needs_its_own(
    own: bool, calls: list[str], configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recorder, "needs_own_pass", own)
    sizes: list[int] = []
    original = BatchedTrainer._pass
    monkeypatch.setattr(BatchedTrainer, "_pass", lambda self, some: (sizes.append(len(some)), original(self, some))[1])
    entries = [
        {"instance_data_dir": str(write_photos(tmp_path / name)), "instance_prompt": f"a {name} dog", "seed": n}
        for n, name in enumerate(("ohwx", "zwx"))
    ]
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(entries))
    values = {"instance_data_dir": None, "instance_prompt": None, "seed": None, "max_train_steps": 1}
    train_subjects(configure(**values, subjects=str(tmp_path / "list.yaml")))
    assert sizes == ([] if own else [2])
    assert calls.count("(") == (2 if own else 0)
    assert [calls.count(name) for name in ("start", "before 0", "penalty", "after 0", "finish")] == [2] * 5
