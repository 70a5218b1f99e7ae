"""Rivals that are not ours: they train the same layers on the same batches, from the same start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import write_photos
from peft import OFTConfig, inject_adapter_in_model
from runs import journal
from safetensors.torch import load_file
from torch import Tensor, nn

from nora_diffusion import UserError, open_pipeline
from nora_diffusion.pipelines.base import EMBEDDED_WEIGHTS
from nora_diffusion.tiny_sd.measures import peers
from nora_diffusion.tiny_sd.measures.classroom import Classroom
from nora_diffusion.tiny_sd.measures.methods import PEERS
from nora_diffusion.tiny_sd.measures.peers import Peer, Rotated, train_peer
from nora_diffusion.tiny_sd.measures.teaching import Student
from nora_diffusion.training import TrainConfig, train
from nora_diffusion.training.run.steps import Stepper

METHODS = ("full", "lokr:rank=2", "oft:block_size=4")
TARGETS = ("attn", "conv")


@pytest.fixture
def config(tiny_base: Path, tmp_path: Path) -> TrainConfig:
    """A run of plain LoRA, whose place a peer takes; without weight decay and clipping."""
    return TrainConfig(
        pretrained_model_name_or_path=str(tiny_base), instance_data_dir=str(write_photos(tmp_path / "photos")),
        instance_prompt="a photo of sks dog", output_dir=str(tmp_path / "run"), method="lora", rank=4, alpha=2.0,
        target_modules=[*TARGETS], max_train_steps=1, train_batch_size=2, learning_rate=1e-2, mixed_precision="no",
        optimizer="sgd", adam_weight_decay=0.0, max_grad_norm=1e9, gradient_accumulation_steps=2, seed=7,
    )  # fmt: skip


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Loss and rate of each step that a peer takes."""
    found = []
    original = Stepper.step

    def step(self: Stepper, number: int) -> tuple[float, float]:
        rate = self.run.schedule.get_last_lr()[0]
        found.append((original(self, number)[0], rate))
        return found[-1]

    monkeypatch.setattr(Stepper, "step", step)
    return found


def weights(pipe: Any, names: list[str]) -> dict[str, Tensor]:
    return {name: pipe.unet.get_parameter(name) for name in names}


@pytest.mark.parametrize("method", METHODS)
def test_the_first_step_of_a_peer_has_the_batch_and_rate_of_our_adapter(
    method: str, config: TrainConfig, steps: list[tuple[float, float]]
) -> None:
    config = replace(config, max_train_steps=2, lr_scheduler="cosine", optimizer="adamw")
    train(config)
    ours = [(loss, rate) for _, loss, rate, _ in journal(config.folder)]
    steps.clear()
    peer = train_peer(replace(config, output_dir=config.output_dir + "-peer"), method)
    assert steps[0] == pytest.approx(ours[0], rel=1e-5)  # at its start every method is the base
    assert steps[1][1] == ours[1][1] and steps[1][0] != pytest.approx(ours[1][0], rel=1e-5)
    assert not peer.error and all(parameter.dtype == torch.float32 for parameter in peer.parameters.values())


def test_full_fine_tuning_moves_the_weights_along_the_gradient_of_our_adapter(config: TrainConfig) -> None:
    """With one step of SGD, ``W1 = W0 - lr G``, and of LoRA, whose ``B`` starts at 0, ``B1 = -lr s G A^T``."""
    config = replace(config, learning_rate=100.0)  # so that rounding of the weights does not show
    train(config)
    adapter = load_file(config.folder / "nora_adapter.safetensors")
    peer = train_peer(replace(config, output_dir=config.output_dir + "-peer"), "full")
    before = weights(open_pipeline(config.pretrained_model_name_or_path), [*peer.parameters])
    assert len(before) == len(adapter) / 2
    for name, after in peer.parameters.items():
        path = f"unet.{name.removesuffix('.weight')}"
        down, up = (adapter[f"{path}.nora_{factor}"].flatten(1) for factor in "AB")
        moved, scale = (after.detach() - before[name]).flatten(1), 2.0 / 4
        assert torch.dist(up, scale * moved @ down.T) < 1e-3 * up.norm()


def test_full_fine_tuning_takes_a_step_of_adamw(config: TrainConfig) -> None:
    plain = train_peer(replace(config, learning_rate=100.0), "full").parameters
    decayed = replace(config, optimizer="adamw", adam_weight_decay=0.1, overwrite_output_dir=True)
    adam = train_peer(decayed, "full").parameters
    for name, before in weights(open_pipeline(config.pretrained_model_name_or_path), [*adam]).items():
        gradient = before - plain[name]
        large = gradient.abs() > 1e-3  # a smaller one is near the rounding of the weights
        after = before * (1 - 1e-2 * 0.1) - 1e-2 * gradient.sign()
        assert large.any() and torch.allclose(adam[name][large], after[large], atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_peer_changes_the_layers_that_our_adapter_would_have_and_no_other(method: str, config: TrainConfig) -> None:
    train(config)
    ours = {key.rpartition(".nora_")[0] for key in load_file(config.folder / "nora_adapter.safetensors")}
    peer = train_peer(replace(config, output_dir=config.output_dir + "-peer", max_train_steps=2), method)
    names = [f"unet.{name}" for name in peer.parameters]
    assert {path for path in ours if any(name.startswith(f"{path}.") for name in names)} == ours
    assert all(any(name.startswith(f"{path}.") for path in ours) for name in names)
    base = open_pipeline(config.pretrained_model_name_or_path).unet.state_dict()
    own = peer.pipe.unet.state_dict()
    frozen = {name.replace(".base_layer", "").replace("parametrizations.weight.original", "weight") for name in own}
    assert base.keys() <= frozen
    trained = set(peer.parameters) if method == "full" else set()
    for name, value in own.items():
        plain = name.replace(".base_layer", "").replace("parametrizations.weight.original", "weight")
        if plain in base:
            assert torch.equal(value, base[plain]) == (name not in trained), name


def test_the_weights_stay_fp32_in_a_bf16_run(config: TrainConfig) -> None:
    lowered = replace(config, mixed_precision="bf16", optimizer="adamw", learning_rate=1e-6)
    peer = train_peer(lowered, "full")
    base = weights(open_pipeline(config.pretrained_model_name_or_path), [*peer.parameters])
    for name, parameter in peer.parameters.items():
        moved = parameter - base[name].bfloat16().float()
        assert parameter.dtype == torch.float32 and 0 < float(moved.detach().abs().max()) < 2e-6
    assert peer.pipe.unet.conv_in.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("layer", [nn.Linear(12, 5), nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(8, 5, 1)])
def test_a_rotated_weight_is_that_of_pefts_merged_layer(layer: nn.Linear | nn.Conv2d) -> None:
    before = layer.weight.detach().clone()
    rotated = Rotated("layer", before[0].numel(), 4)
    assert torch.equal(rotated(before), before)
    nn.init.normal_(rotated.rotation.weight, std=0.1)
    model: Any = inject_adapter_in_model(OFTConfig(oft_block_size=4, target_modules=["0"]), nn.Sequential(layer))
    model[0].oft_R["default"].weight.data = -rotated.rotation.weight.data
    model[0].merge()
    assert torch.allclose(model[0].base_layer.weight, rotated(before), atol=1e-5)
    assert not torch.allclose(rotated(before), before, atol=1e-2)


def test_a_block_that_does_not_divide_a_layer_is_refused(config: TrainConfig) -> None:
    with pytest.raises(UserError, match=r"block_size=7 .* inputs of down_blocks"):
        train_peer(config, "oft:block_size=7")


def test_a_peer_that_diverges_says_why(config: TrainConfig) -> None:
    peer = train_peer(replace(config, learning_rate=1e30, max_train_steps=3), "full")
    assert "not finite at step" in peer.error and "--learning_rate" in peer.error


def test_the_size_of_a_peer_is_that_of_its_file() -> None:
    peer = Peer(None, {"a.weight": nn.Parameter(torch.ones(3, 5)), "b.weight": nn.Parameter(torch.ones(7))})
    assert peer.trained == 22 and 4 * 22 < peer.bytes < 4 * 22 + 300


def test_every_peer_can_be_built() -> None:
    assert peers.BUILDERS.keys() == PEERS.keys()


@pytest.mark.slow
def test_a_classroom_teaches_peers_beside_adapters_and_leaves_its_base_unchanged() -> None:
    room = Classroom(EMBEDDED_WEIGHTS, None, "no")  # type: ignore[arg-type]  # no images, so no probes
    before = {name: value.clone() for name, value in room.pipe.unet.state_dict().items()}
    rates = {"lokr": 1e-2, "lora_r1": 5e-3, "full": 1e-4, "oft": 1e-3, "base": None, "oft:block_size=8": 1e30}
    students = [
        Student(f"student-{n}", "tiger", method, {"learning_rate": rate, "seed": 0, "max_train_steps": 8}, prompts=())
        for n, (method, rate) in enumerate(rates.items())
    ]
    lokr, lora, full, oft, base, failed = room.teach(students)
    assert [lesson.method for lesson in (lokr, lora, full, oft, base, failed)] == [*rates]
    for lesson in (lokr, lora, full, oft):
        assert lesson.scores["heldout_loss"] < base.scores["heldout_loss"] and not lesson.error, lesson.method
        assert 4 * lesson.trained_parameters < lesson.bytes and lesson.cpu_seconds > 0
    assert full.trained_parameters == 7_640_064 and base.trained_parameters == 0
    assert "not finite" in failed.error and failed.scores["heldout_loss"] == float("inf")
    after = room.pipe.unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
