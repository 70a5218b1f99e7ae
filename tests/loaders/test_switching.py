"""Switching loaded adapters touches the layers that hold them, and neither the other modules nor requires_grad."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from nora_diffusion import add_adapter, nora, set_adapters
from nora_diffusion.loaders import active_adapters
from nora_diffusion.pipelines.components import named_tuner_layers


@pytest.fixture
def adapted(pipe: Any) -> Any:
    """A pipeline with two adapters of ours and an ordinary LoRA around them."""
    for name in ("one", "two"):
        add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), name)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"]), "plain")
    return pipe


def test_all_tuner_layers_are_found_in_the_order_of_named_modules(adapted: Any) -> None:
    adapted.unet.shared = nn.ModuleList([adapted.unet.down_blocks[0]])  # the same modules a second time
    expected = [(path, m) for path, m in adapted.unet.named_modules() if isinstance(m, BaseTunerLayer)]
    assert list(named_tuner_layers(adapted.unet)) == expected
    assert len(expected) > len({path for path, _ in expected if "base_layer" not in path}) > 0


def trained(pipe: Any) -> set[str]:
    return {name for name, parameter in pipe.unet.named_parameters() if parameter.requires_grad}


def test_switching_walks_the_layers_only_and_keeps_requires_grad(adapted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = trained(adapted)
    assert before
    monkeypatch.setattr(nn.Module, "named_modules", None)
    for names in (["one"], ["two", "plain"], []):
        set_adapters(adapted, names, [0.5] * len(names))
        assert sorted(active_adapters(adapted.unet)) == sorted(names)
        for _, layer in named_tuner_layers(adapted.unet):
            assert all(layer.scaling[name] == 0.5 * native(layer, name) for name in names if name in layer.scaling)
    monkeypatch.undo()
    assert trained(adapted) == before


def native(layer: Any, name: str) -> float:
    return float(layer.states[name].native_scale if hasattr(layer, "states") else 1 / 2 * layer.lora_alpha[name])


def test_a_weight_that_stays_writes_nothing(adapted: Any) -> None:
    set_adapters(adapted, ["one", "two"], [0.5, 1.0])
    states = [layer.states for _, layer in named_tuner_layers(adapted.unet) if hasattr(layer, "states")]
    versions = [states["one"].scaling_tensor._version for states in states]
    set_adapters(adapted, ["one", "two"], [0.5, 0.3])
    assert [states["one"].scaling_tensor._version for states in states] == versions
    for state in (states[name] for states in states for name in states):
        assert state.scaling_tensor == torch.tensor(state.scaling)


@pytest.mark.parametrize("inference_mode", [False, True])
def test_peft_sets_requires_grad_of_exactly_the_active_adapters(adapted: Any, inference_mode: bool) -> None:
    for _, layer in named_tuner_layers(adapted.unet):
        layer.set_adapter("two", inference_mode=inference_mode)
    found = trained(adapted)
    assert {name.split(".nora_delta.")[1].split(".")[0] for name in found} == (set() if inference_mode else {"two"})
