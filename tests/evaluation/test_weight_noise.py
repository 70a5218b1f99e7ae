"""The held-out loss with noise on the frozen weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import write_photos
from torch import Tensor, nn

from nora_diffusion import UserError, add_adapter, lora, open_pipeline, save_adapter
from nora_diffusion.data import read_source
from nora_diffusion.evaluation.heldout import DRAWS, HeldOut, noisy_weights
from nora_diffusion.evaluation.scoreboard import Scoreboard, noise_rows
from nora_diffusion.evaluation.settings import EvaluationConfig, check_evaluation
from nora_diffusion.evaluation.subjects import EvaluatedSubject
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.loaders import trainable_parameters
from nora_diffusion.pipelines.components import components, projections
from nora_diffusion.training.step.seeds import derive


@pytest.fixture
def adapter(tiny_base: Path, tmp_path: Path) -> Path:
    pipe: Any = open_pipeline(tiny_base)
    add_adapter(pipe, lora(r=2), "one")
    torch.manual_seed(0)
    for parameter in trainable_parameters(pipe, "one").values():
        parameter.data.normal_(std=0.5)
    return save_adapter(pipe, tmp_path / "adapter", "one").parent


@pytest.fixture
def subject(tmp_path: Path) -> EvaluatedSubject:
    photos = [read_source(path) for path in sorted(write_photos(tmp_path / "photos", 2, (16, 16)).iterdir())]
    return EvaluatedSubject("rex", photos, ("{}",), "a sks dog", "a dog", photos)


def weights(pipe: Any) -> dict[str, Tensor]:
    found = {name: projections(module) for name, module in components(pipe).items()}
    return {f"{name}.{path}": layer.weight for name, own in found.items() for path, layer in own.items()}  # type: ignore[misc]


def test_the_loss_is_that_of_noisy_frozen_weights(tiny_base: Path, adapter: Path, subject: EvaluatedSubject) -> None:
    """Against noise that is added to every projection by hand; of the adapter, nothing is noisy."""
    pipe: Any = open_pipeline(tiny_base)
    held_out = HeldOut(pipe, subject, torch.float32)
    frozen = weights(pipe)
    copies = {name: weight.detach().clone() for name, weight in frozen.items()}
    found = held_out.loss_under_noise(str(adapter), 0.5, 0.1)
    assert all(weights(pipe)[name] is weight and torch.equal(weight, copies[name]) for name, weight in frozen.items())
    losses = []
    with held_out._loaded(str(adapter), 0.5):
        for draw in range(DRAWS):
            for component in components(pipe):
                source = torch.Generator().manual_seed(derive(derive(0, "weight noise", draw), component))
                for name in [name for name in frozen if name.startswith(f"{component}.")]:
                    copy = copies[name]
                    noise = torch.randn(copy.flatten(1).shape, generator=source).view_as(copy)
                    frozen[name].data.copy_(copy + 0.1 * copy.abs().max() * noise)
            losses.append(held_out._loss())
    assert found == pytest.approx(sum(losses) / DRAWS, rel=1e-5)
    for name, weight in frozen.items():
        weight.data.copy_(copies[name])
    clean = held_out.losses(None, 1.0)
    assert held_out.loss_under_noise(None, 1.0, 0.0) == pytest.approx(sum(clean) / 2, rel=1e-6)


def test_weights_are_back_after_an_error(tiny_base: Path) -> None:
    pipe: Any = open_pipeline(tiny_base)
    before = weights(pipe)
    with pytest.raises(KeyboardInterrupt), noisy_weights(pipe, 0.1, 0):
        assert all(weights(pipe)[name] is not weight for name, weight in before.items())
        raise KeyboardInterrupt
    assert all(weights(pipe)[name] is weight for name, weight in before.items())
    assert all(isinstance(weight, nn.Parameter) for weight in before.values())


def test_levels_are_rows_of_text_and_in_the_json() -> None:
    board = Scoreboard({"weight_noise": [0.0, 0.02]}, [], [], Path("out"))
    assert noise_rows(board) == []
    board.noisy = {"base": {"0": [0.25, 0.75], "0.02": [1.0, 2.0]}}
    assert noise_rows(board) == [["held-out loss at noise", "0", "0.02"], ["base", "0.5000", "1.5000"]]


def test_it_needs_held_out_images_and_a_level_in_range(tmp_path: Path) -> None:
    folder = str(write_photos(tmp_path / "photos", 1))

    def config(level: float) -> EvaluationConfig:
        return EvaluationConfig([], [folder], Sampling(1, 1.0), judge="tiny", weight_noise=[level])

    with pytest.raises(UserError, match=r"weight_noise=-0.1 must be from 0 to 1"):
        check_evaluation(config(-0.1))
    with pytest.raises(UserError, match="--weight_noise measures the held-out loss"):
        check_evaluation(config(0.1))
