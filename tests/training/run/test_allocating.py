"""Runs with inner ranks by layer: equal in size to uniform ones, on the same outer pairs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from runs import Configure
from safetensors.torch import load_file

from nora_diffusion import UserError, inspect_adapter
from nora_diffusion.training import check, train

VARIATIONS: dict[str, dict[str, Any]] = {
    "nora": {"target_modules": ["attn", "conv"]},
    "one-sided": {"method": "nora_input", "target_modules": ["attn", "ff"]},
    "random": {"method": "lora_mini", "basis": None},
    "awsvd": {"basis": "awsvd"},
    "text encoder": {"train_text_encoder": True},
    "new tokens": {"train_text_encoder_ti": True, "instance_prompt": "a photo of <pet> dog"},
    "prior": {"with_prior_preservation": True, "class_prompt": "a dog", "prior_preservation": "frozen"},
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_measured_ranks_have_the_size_and_the_basis_of_equal_ones(
    name: str, configure: Configure, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nora_diffusion")
    variation = VARIATIONS[name]
    uniform = train(configure(**variation, output_dir=str(tmp_path / "uniform")))
    assert "inner ranks by layer" not in caplog.text
    measured = train(configure(**variation, output_dir=str(tmp_path / "measured"), rank_allocation="gradient"))
    assert "inner ranks by layer" in caplog.text
    assert 0.8 * uniform.trainable_parameters < measured.trainable_parameters <= uniform.trainable_parameters
    one, other = load_file(uniform.adapter_path), load_file(measured.adapter_path)
    assert one.keys() == other.keys()
    frozen = [key for key in one if key.endswith("_out")]
    assert frozen and all(torch.equal(one[key], other[key]) for key in frozen)
    ranks = {key: len(value) for key, value in other.items() if key.endswith("A_in")}
    assert len(set(ranks.values())) > 1 and min(ranks.values()) >= 1
    info = inspect_adapter(measured.adapter_path)
    assert "by layer" in info.ranks and info.inner_r == 2
    for component, axes in info.axes.items():
        own = {key: rank for key, rank in ranks.items() if key.startswith(f"{component}.")}
        assert all(axes.inner_rank_for(key.removeprefix(f"{component}.")[: -len(".nora_A_in")]) == rank
                   for key, rank in own.items())  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "lora", "inner_rank": None, "basis": None}, "use --method nora, nora_input, lora_mini"),
        ({"method": "malora", "basis": None}, "use --method nora, nora_input, lora_mini"),
        ({"core": "dense", "inner_rank": None}, "needs an inner rank, which --core dense does not have"),
    ],
)
def test_methods_without_an_inner_pair_are_refused(settings: dict[str, Any], words: str, configure: Configure) -> None:
    with pytest.raises(UserError, match=words):
        check(configure(rank_allocation="gradient", **settings))
