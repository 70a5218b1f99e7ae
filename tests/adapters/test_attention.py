"""The attention processors equal the tuner layers, and fall back where they must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig

from nora_diffusion import add_adapter, set_adapters
from nora_diffusion.adapters import NoraLayer, dora, lora, melora, mor, mora, nora
from nora_diffusion.attention import AdapterAttnProcessor, MoRAttnProcessor, NoRAAttnProcessor
from nora_diffusion.loaders import trainable_parameters


def randomise(pipe: Any, name: str) -> None:
    for parameter in trainable_parameters(pipe, name).values():
        parameter.data.normal_(std=0.3)


def outputs(pipe: Any, processor: AdapterAttnProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    x, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    with torch.no_grad():
        before = pipe.unet(x, 3, states).sample
        standard = pipe.unet.attn_processors
        pipe.unet.set_attn_processor(processor)
        after = pipe.unet(x, 3, states).sample
        pipe.unet.set_attn_processor(standard)
        assert torch.equal(pipe.unet(x, 3, states).sample, before)
    return before, after


ADAPTERS = [[], ["n"], ["m"], ["n", "l"], ["n", "m", "l"], ["n", "d"], ["b", "s"]]


@pytest.mark.parametrize("processor", [NoRAAttnProcessor(), MoRAttnProcessor()], ids=["nora", "mor"])
@pytest.mark.parametrize("adapters", ADAPTERS, ids="-".join)
def test_processor_equals_layers(pipe: Any, processor: AdapterAttnProcessor, adapters: list[str]) -> None:
    configs = {"n": nora(r=4, inner_r=2), "m": mor(r=4, num_experts=3), "l": lora(r=2)}
    configs |= {"d": dora(r=2), "b": melora(r=4, blocks=2), "s": mora(r=2)}
    for name in adapters:
        add_adapter(pipe, configs[name], f"{name}_1")
        randomise(pipe, f"{name}_1")
    if adapters:
        set_adapters(pipe, [f"{name}_1" for name in adapters], [0.7 + i for i in range(len(adapters))])
    before, after = outputs(pipe, processor)
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-6)


def test_processor_under_a_foreign_lora(pipe: Any) -> None:
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "plain")
    add_adapter(pipe, nora(r=4, inner_r=2), "one")
    randomise(pipe, "one")
    set_adapters(pipe, ["plain", "one"])
    before, after = outputs(pipe, NoRAAttnProcessor())
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-6)


def test_projections_really_are_fused(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    add_adapter(pipe, nora(r=4, inner_r=2), "one")
    randomise(pipe, "one")
    pipe.unet.set_attn_processor(NoRAAttnProcessor())
    calls: list[NoraLayer] = []
    monkeypatch.setattr(NoraLayer, "forward", lambda self, x: calls.append(self) or self.base_layer(x))
    with torch.no_grad():
        pipe.unet(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 16))
    assert not calls
