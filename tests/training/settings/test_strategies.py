"""Which settings go with a strategy."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from nora_diffusion.errors import UserError
from nora_diffusion.training.planning.adapter import adapter_config
from nora_diffusion.training.settings.checks import check_config
from nora_diffusion.training.settings.config import Strategy, TrainConfig
from nora_diffusion.training.settings.defaults import with_defaults
from nora_diffusion.training.strategies.table import STRATEGIES

DATA: dict[str, Any] = {"instance_data_dir": "photos", "instance_prompt": "a photo of sks dog"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"chain_links": 2}, "--chain_links needs --strategy chain"),
    ({"strategy": "chain", "shortcut": "input"}, "--shortcut needs --strategy reslora"),
    ({"strategy": "chain", "method": "mor"}, "the experts of --method mor have no single pair in a layer"),
    ({"strategy": "flat", "method": "moe_lora"}, "the experts of --method moe_lora"),
    ({"strategy": "halora", "method": "lora_xs"}, "trains a square core"),
    ({"strategy": "reslora", "core": "diagonal"}, "trains a square core"),
    ({"strategy": "chain", "method": "mora"}, "trains a square core"),
    ({"strategy": "chain", "method": "melora"}, "block-diagonal factors"),
    ({"strategy": "flat", "method": "dora"}, "DoRA's magnitude rescales the frozen weight"),
    ({"strategy": "chain", "method": "lora", "magnitude": True}, "leave out --magnitude"),
    ({"strategy": "reslora", "method": "dylora"}, "--method dylora draws the rank of each step"),
    ({"strategy": "chain", "rank_allocation": "gradient"}, "leave out --rank_allocation gradient"),
    ({"strategy": "chain", "method": "lora", "optimizer": "adafactor"}, "--optimizer adafactor cannot start anew"),
    ({"strategy": "chain", "method": "lora", "scale_weight_norms": 1.0}, "leave out --scale_weight_norms"),
    ({"strategy": "chain", "inner_rank": 12, "rank": 32, "chain_links": 3}, "3 links of --inner_rank 12 exceed"),
    ({"strategy": "chain", "method": "lora", "start_from": "out/dog"}, "leave out --start_from"),
    ({"strategy": "chain", "method": "lora", "optimizer": "lora_pro"}, "--optimizer lora_pro cannot start anew"),
    ({"strategy": "reslora", "method": "lora", "rank_allocation": "adalora"}, "leave out --rank_allocation adalora"),
    ({"strategy": "reslora", "method": "nora"}, "no nora adapter: use --shortcut input or middle"),
    ({"strategy": "reslora", "method": "nora_input"}, "no nora_input adapter"),
    ({"strategy": "chain", "method": "lora", "chain_links": 0}, "chain_links=0 must be above 0"),
]  # fmt: skip
ACCEPTED: list[dict[str, Any]] = [
    {"strategy": "chain"},
    {"strategy": "chain", "method": "nora_input", "chain_links": 3},
    {"strategy": "reslora", "method": "lora"},
    {"strategy": "reslora", "shortcut": "middle"},
    {"strategy": "flat", "method": "lora_xs"},
    {"strategy": "flat", "method": "melora", "scale_weight_norms": 1.0},
    {"strategy": "flat", "method": "mora"},
    {"strategy": "flat", "method": "dylora", "optimizer": "adafactor"},
    {"strategy": "halora", "rank_allocation": "gradient"},
]


@pytest.mark.parametrize(("settings", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_it_is_refused_in_words(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_config(TrainConfig(**DATA, **settings))


@pytest.mark.parametrize("settings", ACCEPTED, ids=map(str, ACCEPTED))
def test_it_goes_together(settings: dict[str, Any]) -> None:
    check_config(TrainConfig(**DATA, **settings))


def test_int8_weights_take_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nora_diffusion.training.settings.checks._need", lambda *_: None)
    config = TrainConfig(**DATA, quantize_base="int8", gradient_checkpointing=True, strategy="halora")
    with pytest.raises(UserError, match="leave out --quantize_base"):
        check_config(config)


def test_every_strategy_is_in_the_table() -> None:
    assert get_args(Strategy) == ("none", *STRATEGIES)


def test_the_adapter_of_a_chain_has_all_ranks_at_the_scale_of_one() -> None:
    def config(**settings: Any) -> Any:
        return adapter_config(with_defaults(TrainConfig(strategy="chain", chain_links=3, **settings)))

    lora = config(method="lora", rank=4, alpha=8.0)
    assert lora.r == 12 and lora.scale_for("to_q") == 2.0
    assert config(method="lora", rank=4).scale_for("to_q") == 1.0
    nora = config(method="nora", rank=32, inner_rank=5, alpha=16.0)
    assert (nora.r, nora.inner_r, nora.scale_for("to_q")) == (32, 15, 0.5)
