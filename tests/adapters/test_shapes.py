"""What a file must hold is known without torch: it equals what the layers are built of, and what PEFT selects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from nora_diffusion import UserError
from nora_diffusion.adapters import PRESETS, AdapterConfig, in_blocks, nora
from nora_diffusion.adapters.axes import Axes
from nora_diffusion.adapters.config import Start
from nora_diffusion.adapters.shapes import FROZEN, factor_shapes, narrowest_rank
from nora_diffusion.adapters.tuner.build import build_delta, flat_weight, kernel_of

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "square": lambda: nn.Linear(64, 64, bias=False),
    "wide": lambda: nn.Linear(96, 32, bias=False),
    "smaller than the rank": lambda: nn.Linear(8, 4, bias=False),
    "convolution": lambda: nn.Conv2d(8, 16, 3, bias=False),
    "1x1 convolution": lambda: nn.Conv2d(8, 16, 1, bias=False),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "pattern": {"rank_pattern": {"to_q": 6}},
    "inner pattern": {"inner_rank_pattern": {"to_q": 2}},
    "inner pattern beyond the outer rank": {"r": 6, "inner_r": 2, "inner_rank_pattern": {"to_q": 20}},
    "magnitude": {"magnitude": True},
    "blocks": {"blocks": 4},
    "dense": {"core": "dense"},
    "diagonal": {"core": "diagonal"},
    "all trained": {"trained": ["down", "core", "up"]},
    "up trained": {"trained": ["up"]},
    "prompt": {"router": "prompt"},
    "independent": {"experts": "independent"},
    "projected": {"experts": "projected", "inner_r": 3},
}


def made(method: str, options: dict[str, Any]) -> AdapterConfig:
    """A config, if the method has this combination."""
    try:
        return PRESETS[method](**options)
    except (TypeError, UserError):
        pytest.skip("the method has no such setting")


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("method", PRESETS)
def test_shapes_are_those_of_the_built_layer(method: str, options: str, layer: str) -> None:
    config = made(method, OPTIONS[options])
    config.start = Start(empty=True, condition=0 if config.router == "token" else 7)
    with torch.device("meta"):
        base = LAYERS[layer]()
        try:
            delta, refused = build_delta(config, base, "block.to_q"), None
        except UserError as error:
            delta, refused = None, str(error)
    size, kernel = flat_weight(base).shape, kernel_of(base)
    if delta is None:
        with pytest.raises(UserError) as again:
            factor_shapes(config, size, kernel, "block.to_q", 7)
        assert str(again.value) == refused
        return
    shapes = factor_shapes(config, size, kernel, "block.to_q", 7)
    built = {name.rpartition(".")[2]: tuple(value.shape) for name, value in delta.state_dict().items()}
    assert shapes == built
    trained = {name.rpartition(".")[2] for name, _ in delta.named_parameters()}
    assert {name for name in shapes if name not in FROZEN} == trained
    if config.router == "none":
        assert narrowest_rank(config, size, "block.to_q") == delta.full_rank  # type: ignore[union-attr]


PATHS = [
    f"{block}.attentions.0.{name}"
    for block in ("down_blocks.1", "down_blocks.10", "text_model.encoder.layers.0")
    for name in ("to_q", "q", "to_out.0", "ff.net.0.proj", "conv1", "xto_q")
] + ["to_q", "q", ""]
SELECTIONS: list[dict[str, Any]] = [
    {},
    {"target_modules": ["attn", "ff"]},
    {"target_modules": ["q", "conv1"], "exclude_modules": ["to_q", "down_blocks.1.attentions.0.conv1"]},
    {"target_modules": in_blocks(["down_blocks.1"], ["attn", "conv"])},
    {"target_modules": r".*to_(q|k)", "exclude_modules": r"down_blocks\.10.*"},
    {"target_modules": ["to_q", "conv1"], "modules_to_save": ["conv1"]},
    {"target_modules": ["to_q"], "modules_to_save": ["down_blocks.1"]},
]


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_targets_are_those_that_peft_selects(selection: dict[str, Any]) -> None:
    config = nora(**selection)
    chosen = [path for path in PATHS if config.selects(path)]
    assert chosen == [path for path in PATHS if check_target_module_exists(config, path)]
    assert 0 < len(chosen) < len(PATHS)


def test_a_config_is_its_axes() -> None:
    config = nora(r=8, alpha=2.0, target_modules=["attn", "ff"], rank_pattern={"to_q": 4})
    axes = Axes(**{name: getattr(config, name) for name in Axes.__annotations__})
    assert vars(AdapterConfig(**vars(axes))) == vars(config)
    with pytest.raises(UserError, match="r=0"):
        Axes(r=0)
