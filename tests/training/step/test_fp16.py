"""fp16 and its gradient scaler, tested on a CPU: skipped steps, their limit, resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Configure, assert_same_run
from safetensors.torch import load_file

from nora_diffusion.errors import UserError
from nora_diffusion.training import TrainConfig, train
from nora_diffusion.training.many.subjects import train_subjects
from nora_diffusion.training.planning import plan
from nora_diffusion.training.run.updates import MAX_SKIPS, Updates
from nora_diffusion.training.step.averaging import Average

FP16 = {"mixed_precision": "fp16", "lr_scheduler": "linear", "lr_warmup_steps": 0, "ema_decay": 0.9}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 is refused on a CPU only because it is slow, which does not matter for the tiny base."""
    original = plan.resolve_settings

    def resolve_settings(
        config: TrainConfig, pipe: Any, checkpoint: Any, photos: int, _: Any, processes: int
    ) -> TrainConfig:
        return original(config, pipe, checkpoint, photos, torch.device("cuda"), processes)

    monkeypatch.setattr(plan, "resolve_settings", resolve_settings)


def overflow_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make the gradients of these steps (counted from 0), or of all steps if none are given, NaN."""
    original = Updates._step_optimizer

    def step_optimizer(self: Updates, step: int) -> Any:
        for factor in self.run.parameters.values():
            if (not steps or step in steps) and factor.grad is not None:
                factor.grad.fill_(float("nan"))
        return original(self, step)

    monkeypatch.setattr(Updates, "_step_optimizer", step_optimizer)


def rates(folder: Path) -> list[float]:
    return [json.loads(line)["lr"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_skipped_step_updates_neither_schedule_nor_ema(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    overflow_at(monkeypatch, 1)
    averaged: list[int] = []
    original = Average.update
    monkeypatch.setattr(Average, "update", lambda self, p, done: (averaged.append(done), original(self, p, done))[1])
    config = configure(**FP16, max_train_steps=4, checkpointing_steps=1)
    train(config)
    found = rates(config.folder)
    assert found[1] == found[2] > found[3]
    assert averaged == [1, 3, 4]
    one, two = (load_file(config.folder / f"checkpoints/step-{n}/optimizer.safetensors") for n in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_with_skipped_steps_is_resumed_exactly(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow_at(monkeypatch, 0, 2)
    settings = {**FP16, "max_train_steps": 4, "checkpointing_steps": 1}
    whole = configure(output_dir=str(tmp_path / "whole"), **settings)
    train(whole)
    for step in (1, 2, 3):
        resumed = configure(output_dir=str(tmp_path / f"from-{step}"), **settings)
        train(resumed)
        start = str(resumed.folder / f"checkpoints/step-{step}")
        train(configure(output_dir=str(resumed.folder), resume_from_checkpoint=start, **settings))
        assert_same_run(whole.folder, resumed.folder, last=4)


@pytest.mark.parametrize("steps", [3, 2 * MAX_SKIPS])
def test_a_run_that_skips_all_steps_fails(steps: int, configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    overflow_at(monkeypatch)
    config = configure(**FP16, max_train_steps=steps)
    with pytest.raises(UserError, match=r"the gradients overflow.* fp16 .*--mixed_precision no, and start again"):
        train(config)
    assert json.loads((config.folder / "state.json").read_text())["status"] == "failed"
    assert len(rates(config.folder)) < min(steps, MAX_SKIPS)


def test_the_number_of_skips_in_a_row_is_limited(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    overflow_at(monkeypatch)
    original = torch.amp.GradScaler.__init__
    monkeypatch.setattr(
        torch.amp.GradScaler, "__init__", lambda self, *a, **k: original(self, *a, init_scale=2.0**60, **k)
    )
    config = configure(**FP16, max_train_steps=2 * MAX_SKIPS)
    with pytest.raises(UserError, match=f"at step {MAX_SKIPS}, so training stopped"):
        train(config)


def test_one_of_several_subjects_overflows(
    configure: Configure, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects_file = tmp_path / "subjects.yaml"
    subjects_file.write_text(f"- instance_data_dir: {photos}\n  instance_prompt: a photo of sks dog\n")
    overflow_at(monkeypatch)
    config = configure(**FP16, subjects=str(subjects_file), instance_data_dir=None, instance_prompt=None)
    with pytest.raises(UserError, match="subject: the gradients overflowed fp16 at every step"):
        train_subjects(config)
