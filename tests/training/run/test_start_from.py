"""``--start_from``: a run that continues the training of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import write_photos
from runs import Configure, assert_same_run
from safetensors.torch import load_file

from nora_diffusion.errors import UserError
from nora_diffusion.training import train

NAME = "nora_adapter.safetensors"
METHODS: dict[str, dict[str, Any]] = {
    "nora": {},
    "gradient": {"rank_allocation": "gradient"},
    "lora": {"method": "lora", "inner_rank": None, "basis": None, "alpha": 2.0},
    "dora": {"method": "dora", "inner_rank": None, "basis": None},
    "mor": {"method": "mor", "inner_rank": None, "basis": None, "num_experts": 2, "router": "prompt"},
}


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_on_from_the_factors_of_the_adapter(configure: Configure, tmp_path: Path, method: str) -> None:
    first = tmp_path / "first"
    train(configure(output_dir=str(first), **METHODS[method]))
    others = write_photos(tmp_path / "others", 2, seed=5)
    settings = {**METHODS[method], "rank_allocation": "uniform", "start_from": str(first)}
    # The rate is too small to change a bit.
    train(configure(**settings, instance_data_dir=str(others), learning_rate=1e-30, max_train_steps=1))
    found, start = load_file(tmp_path / "run" / NAME), load_file(first / NAME)
    assert found.keys() == start.keys()
    assert all(torch.equal(value, start[key]) for key, value in found.items())


def test_it_resumes_bit_for_bit(configure: Configure, tmp_path: Path) -> None:
    first, whole, halves = tmp_path / "first", tmp_path / "whole", tmp_path / "halves"
    train(configure(output_dir=str(first)))
    settings: dict[str, Any] = {"start_from": str(first), "seed": 8, "dropout": 0.5}
    train(configure(**settings, output_dir=str(whole)))
    train(configure(**settings, output_dir=str(halves), max_train_steps=1))
    train(configure(**settings, output_dir=str(halves), resume_from_checkpoint="latest"))
    assert_same_run(whole, halves, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner_rank": 1}, "has inner_r=2, the settings say 1"),
        ({"rank": 5}, "has r=4, the settings say 5"),
        ({"method": "lora", "inner_rank": None, "basis": None}, "has method=nora, the settings say lora"),
        ({"magnitude": True}, "has magnitude=False"),
        ({"train_text_encoder": True}, "leave out --train_text_encoder"),
        ({"rank_allocation": "gradient"}, "leave out --rank_allocation"),
        ({"basis_from": "first"}, "leave out --basis_from"),
        ({"train_text_encoder_ti": True}, "leave out --train_text_encoder_ti"),
    ],
)
def test_what_does_not_fit_is_refused(
    configure: Configure, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    first = tmp_path / "first"
    train(configure(output_dir=str(first), max_train_steps=1))
    with pytest.raises(UserError, match=message):
        train(configure(start_from=str(first), **changes))
    assert not (tmp_path / "run").exists()


def test_a_missing_adapter_is_refused(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter at"):
        train(configure(start_from=str(tmp_path / "nothing" / "here")))
