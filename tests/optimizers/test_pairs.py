"""Which parameters are pairs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nora_diffusion.optimizers import LoRAPro, Pair, pairs_of


def parameters(**shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    return {name.replace("__", "."): nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("unet__a__nora_A", "unet__a__nora_B"),
        ("unet__a__nora_A_in", "unet__a__nora_B_in"),
        ("unet__a__nora_A_in", "unet__a__nora_B"),
        ("base__a__lora_A__default__weight", "base__a__lora_B__default__weight"),
        ("lora_unet_a__lora_down__weight", "lora_unet_a__lora_up__weight"),
        ("unet__a__lora__down__weight", "unet__a__lora__up__weight"),
    ],
)
def test_factors_are_paired_by_the_names_of_each_ecosystem(down: str, up: str) -> None:
    named = parameters(**{down: (2, 5), "unet__b__nora_A": (2, 5), "unet__a__nora_m": (7,), up: (7, 2)})
    pairs, others = pairs_of(named.items(), scale=lambda name: float(len(name)))
    assert [(p.A, p.B) for p in pairs] == [(named[down.replace("__", ".")], named[up.replace("__", ".")])]
    assert pairs[0].scale == len(down.replace("__", "."))
    assert others == [named["unet.b.nora_A"], named["unet.a.nora_m"]]


@pytest.mark.parametrize("beside", ["unet__a__nora_W_g", "unet__a__nora_l"])
def test_factors_of_mixtures_and_scaled_ranks_are_no_pairs(beside: str) -> None:
    named = parameters(unet__a__nora_A=(2, 5), unet__a__nora_B=(7, 2), **{beside: (2,)})
    assert pairs_of(named.items()) == ([], [*named.values()])


def test_frozen_factors_are_left_out() -> None:
    named = parameters(a__lora_A=(2, 5), a__lora_B=(7, 2), b=(3,))
    named["a.lora_A"].requires_grad_(False)
    assert pairs_of(named.items()) == ([], [named["a.lora_B"], named["b"]])


def test_factors_that_do_not_fit_and_wrong_options_are_refused() -> None:
    down, up = nn.Parameter(torch.zeros(4, 5)), nn.Parameter(torch.zeros(7, 3))
    with pytest.raises(ValueError, match="are no pair"):
        LoRAPro([Pair(down, up)])
    with pytest.raises(ValueError, match="are no pair"):  # two blocks, but 7 rows
        LoRAPro([Pair(down, nn.Parameter(torch.zeros(7, 2)))])
    good = Pair(down, nn.Parameter(torch.zeros(7, 4)))
    with pytest.raises(ValueError, match="scale 0"):
        LoRAPro([good._replace(scale=0.0)])
    with pytest.raises(ValueError, match="pairs or params"):
        LoRAPro([{"pairs": [good], "params": [up]}])
    for wrong in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"damping": -1.0}, {"moments": "none"}, {"lr_ratio": -2.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LoRAPro([good], **wrong)
