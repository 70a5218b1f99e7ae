"""The attention processors equal the tuner layers, fall back to them if they must, and can be removed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig

from nora_diffusion import UserError, add_adapter, set_adapters
from nora_diffusion.adapters import NoraLayer, dora, lora, lora_xs, mor, nora
from nora_diffusion.attention import (
    AdapterAttnProcessor,
    MoRAttnProcessor,
    NoRAAttnProcessor,
    remove_adapter_processors,
    set_adapter_processors,
)
from nora_diffusion.loaders import trainable_parameters

PROCESSORS = [AdapterAttnProcessor, NoRAAttnProcessor, MoRAttnProcessor]
ADAPTERS = {
    "nest": nora(r=4, inner_r=2),
    "mix": mor(r=4, num_experts=3),
    "rows": mor(r=4, num_experts=3, router="prompt+timestep"),
    "plain": lora(r=2),
    "square": lora_xs(r=3),
    "long": dora(r=2),
}


def adapt(pipe: Any, *names: str) -> None:
    for name in names:
        add_adapter(pipe, ADAPTERS[name], name)
        for parameter in trainable_parameters(pipe, name).values():
            parameter.data.normal_(std=0.3)
    if names:
        set_adapters(pipe, list(names), [0.7 + i for i in range(len(names))])


def unet(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    with torch.no_grad():
        return pipe.unet(x, 3, states).sample


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize(
    "names",
    [[], ["nest"], ["mix"], ["rows"], ["long"], ["nest", "plain", "square"], ["nest", "mix"], list(ADAPTERS)],
    ids="-".join,
)
def test_processor_equals_layers(pipe: Any, processor: type[AdapterAttnProcessor], names: list[str]) -> None:
    adapt(pipe, *names)
    before = unet(pipe)
    assert set_adapter_processors(pipe, processor()) == 8
    # Products in another order: rounding depends on the CPU, and a wiring error would exceed it by far.
    assert (unet(pipe) - before).norm() < 1e-5 * before.norm()
    remove_adapter_processors(pipe)
    assert torch.equal(unet(pipe), before)
    assert {type(p) for p in pipe.unet.attn_processors.values()} == {AttnProcessor2_0}


def test_processor_under_a_foreign_lora(pipe: Any) -> None:
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "other")
    adapt(pipe, "nest")
    set_adapters(pipe, ["other", "nest"])
    before = unet(pipe)
    set_adapter_processors(pipe)
    torch.testing.assert_close(unet(pipe), before, atol=1e-6, rtol=1e-6)


def test_processor_follows_changes_at_once(pipe: Any) -> None:
    """Weights, disabling and fusing take effect at once: the processor has no state of its own."""
    adapt(pipe, "nest", "mix")
    for change in (
        lambda: set_adapters(pipe, ["nest", "mix"], [0.2, 0.0]),
        lambda: pipe.disable_lora(),
        lambda: pipe.enable_lora(),
        lambda: pipe.fuse_lora(components=["unet"], adapter_names=["nest"]),
        lambda: pipe.disable_lora(),
        lambda: pipe.delete_adapters("nest"),
    ):
        change()
        set_adapter_processors(pipe)
        found = unet(pipe)
        remove_adapter_processors(pipe)
        torch.testing.assert_close(found, unet(pipe), atol=1e-6, rtol=1e-6)


def test_hooked_layers_are_called(pipe: Any) -> None:
    adapt(pipe, "nest")
    set_adapter_processors(pipe)
    seen: list[int] = []
    layer = next(m for m in pipe.unet.modules() if isinstance(m, NoraLayer))
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    unet(pipe)
    handle.remove()
    assert seen == [1]


def test_projections_are_fused(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapt(pipe, "nest", "mix")
    pipe.unet.set_attn_processor(AdapterAttnProcessor())
    calls: list[NoraLayer] = []
    monkeypatch.setattr(NoraLayer, "forward", lambda self, x: calls.append(self) or self.base_layer(x))
    unet(pipe)
    assert not calls
    remove_adapter_processors(pipe)
    unet(pipe)
    assert calls


def test_custom_processors_stay(pipe: Any) -> None:
    class Special(AttnProcessor2_0):
        pass

    adapt(pipe, "nest")
    path = next(iter(pipe.unet.attn_processors))
    special = Special()
    pipe.unet.set_attn_processor({**pipe.unet.attn_processors, path: special})
    assert set_adapter_processors(pipe) == 7
    assert set_adapter_processors(pipe, NoRAAttnProcessor()) == 7
    assert pipe.unet.attn_processors[path] is special
    remove_adapter_processors(pipe)
    assert pipe.unet.attn_processors[path] is special
    pipe.unet.set_attn_processor(special)
    with pytest.raises(UserError, match="Special"):
        set_adapter_processors(pipe)


def test_fusing_projections_is_refused_while_adapters_are_live(pipe: Any) -> None:
    from nora_diffusion import delete_adapter

    before = unet(pipe)
    adapt(pipe, "nest", "mix")
    live = unet(pipe)
    with pytest.raises(UserError, match=r"would drop the adapters mix, nest"):
        pipe.fuse_qkv_projections(vae=False)
    assert torch.equal(unet(pipe), live)
    delete_adapter(pipe, "mix")
    pipe.disable_lora()
    with pytest.raises(UserError, match="nest"):  # enabling it again would not bring it back
        pipe.fuse_qkv_projections(vae=False)
    pipe.enable_lora()
    pipe.fuse_lora(components=["unet"])
    fused = unet(pipe)
    pipe.fuse_qkv_projections(vae=False)
    torch.testing.assert_close(unet(pipe), fused, atol=1e-5, rtol=1e-5)
    pipe.unfuse_qkv_projections(vae=False)
    pipe.unfuse_lora(components=["unet"])
    delete_adapter(pipe, "nest")
    assert "fuse_qkv_projections" not in vars(pipe.unet)
    assert torch.equal(unet(pipe), before)
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(UserError, match="unfuse_qkv_projections"):
        adapt(pipe, "nest")
    pipe.unfuse_qkv_projections(vae=False)
    adapt(pipe, "nest")
