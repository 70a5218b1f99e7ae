"""Calls of several pictures as one call."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from nora_diffusion.serving.merging import Arguments, merged, parted


def call(rows: int, time: float, seed: int = 0, side: int = 4, **others: Any) -> Arguments:
    generator = torch.Generator().manual_seed(seed)
    latents, text = torch.randn(rows, 2, side, side, generator=generator), torch.randn(rows, 3, generator=generator)
    values = {"encoder_hidden_states": text, "added": {"ids": text[:, :1], "none": None}, "return_dict": False}
    return Arguments.of((latents, torch.tensor(time)), {**values, **others})


def test_rows_are_joined_and_each_has_its_timestep() -> None:
    one, two = call(2, 10.0), call(1, 20.0, seed=1)
    both = merged([one, two])
    assert both.rows == 3 and both.args[1].tolist() == [10.0, 10.0, 20.0]
    for name in ("encoder_hidden_states",):
        assert torch.equal(both.kwargs[name], torch.cat([one.kwargs[name], two.kwargs[name]]))
    assert both.kwargs["added"]["ids"].shape == (3, 1) and both.kwargs["added"]["none"] is None


def test_only_calls_of_one_kind_merge() -> None:
    positions = torch.zeros(5, 3)
    assert call(2, 10.0).key == call(1, 20.0, seed=1).key
    assert call(2, 10.0).key != call(2, 10.0, side=8).key
    assert call(2, 10.0).key != call(2, 10.0, return_dict=True).key
    assert call(2, 10.0, img_ids=positions).key == call(2, 10.0, img_ids=positions.clone()).key
    assert call(2, 10.0, img_ids=positions).key != call(2, 10.0, img_ids=positions + 1).key
    assert call(2, 10.0, others=[positions]).key != call(2, 10.0, others=[positions]).key
    assert merged([call(1, 1.0, img_ids=positions)] * 2).kwargs["img_ids"] is positions


def test_results_are_parted_in_tuples_and_outputs() -> None:
    result = torch.arange(6.0).view(3, 2)
    for whole in ((result,), UNet2DConditionOutput(sample=result)):
        one, two = parted(whole, [2, 1])
        assert torch.equal(one[0], result[:2]) and torch.equal(two[0], result[2:]) and type(one) is type(whole)
