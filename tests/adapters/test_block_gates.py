"""One gate over the modules of a block (MiLoRA), against the formula."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import randomize
from torch import Tensor

from nora_diffusion import UserError, add_adapter, delete_adapter, load_adapter, mixed_batch, save_adapter, set_adapters
from nora_diffusion.adapters import milora, moe_lora, mor
from nora_diffusion.adapters.targets import block_of
from nora_diffusion.loaders.gates import mean_gates
from nora_diffusion.pipelines.components import nora_layers

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


def inputs(rows: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 4, 8, 8, generator=generator), torch.randn(rows, 5, 16, generator=generator)


def observed(pipe: Any, states: Tensor, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of each adapted layer of the block in one pass."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        layer.register_forward_hook(lambda _, args, y, path=path: seen.__setitem__(path, (args[0], y)))
        for path, layer in nora_layers(pipe.unet, "one").items()
        if path.startswith(BLOCK)
    ]
    pipe.unet(x, 3, states)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("top_k", [0, 1, 3, 100])
def test_each_module_has_its_share_of_the_gate_of_its_block(pipe: Any, top_k: int, grad: bool) -> None:
    add_adapter(pipe, milora(r=2, alpha=6.0, top_k=top_k), "one")
    randomize(pipe)
    x, states = inputs()
    layers = {path: layer for path, layer in nora_layers(pipe.unet, "one").items() if path.startswith(BLOCK)}
    assert len(layers) == 10  # q, k, v and out of two attentions, and two of the feed-forward network
    prompts = states.mean(1)
    powers = torch.exp(torch.stack([prompts @ layer.delta("one").W_g[0] for layer in layers.values()], 1))
    gates = powers / powers.sum(1, keepdim=True)
    smallest = gates.sort(1, descending=True).values[:, : top_k or 10].min(1, keepdim=True).values
    gates = torch.where(gates >= smallest, gates, 0)
    with torch.set_grad_enabled(grad):
        seen = observed(pipe, states, x)
    for number, (path, layer) in enumerate(layers.items()):
        entered, left = seen[path]
        delta: Any = layer.delta("one")
        dense = (6.0 / 2) * delta.experts.B @ delta.experts.A
        expected = layer.base_layer(entered) + gates[:, number].view(-1, 1, 1) * (entered @ dense.T)
        torch.testing.assert_close(left, expected, atol=1e-5, rtol=1e-4)


def test_every_module_of_a_block_moves_its_router(pipe: Any) -> None:
    """A module that the prompt does not use still learns that others are used: its row of the router gets gradients."""
    add_adapter(pipe, milora(r=2, top_k=2), "one")
    randomize(pipe)
    x, states = inputs()
    pipe.unet(x, 3, states).sample.square().mean().backward()
    layers = nora_layers(pipe.unet, "one").values()
    assert all(layer.delta("one").W_g.grad.abs().sum() > 0 for layer in layers)
    assert any(layer.delta("one").experts.B.grad is None or not layer.delta("one").experts.B.grad.any()
               for layer in layers)  # fmt: skip


def test_copies_files_mixed_batches_and_other_adapters_have_their_own_gates(pipe: Any, tmp_path: Path) -> None:
    config = milora(r=2, top_k=3)
    for name, seed in (("one", 0), ("two", 1)):
        add_adapter(pipe, copy.deepcopy(config), name)
        randomize(pipe, name, seed=seed)
    x, states = inputs(2)
    outputs = []
    with torch.no_grad():
        for name in ("one", "two"):
            set_adapters(pipe, name)
            outputs.append(pipe.unet(x, 3, states).sample)
        with mixed_batch(pipe, ["one", "two"]):
            mixed = pipe.unet(x, 3, states).sample
        torch.testing.assert_close(mixed, torch.stack([outputs[0][0], outputs[1][1]]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(copy.deepcopy(pipe.unet)(x, 3, states).sample, outputs[1])
        save_adapter(pipe, tmp_path, "two")
        delete_adapter(pipe, "two")
        set_adapters(pipe, "one")
        torch.testing.assert_close(pipe.unet(x, 3, states).sample, outputs[0])
        load_adapter(pipe, tmp_path, "again")
        set_adapters(pipe, "again")
        torch.testing.assert_close(pipe.unet(x, 3, states).sample, outputs[1], atol=1e-5, rtol=1e-4)


def test_a_fixed_gate_is_the_mean_share(pipe: Any) -> None:
    add_adapter(pipe, milora(r=2, top_k=0), "one")
    randomize(pipe)
    fixed = mean_gates(pipe, "one", ["a dog", "a cat"])
    shares = [gate for path, gate in fixed.gates.items() if path.startswith(f"unet.{BLOCK}")]
    torch.testing.assert_close(torch.cat(shares).sum(), torch.tensor(1.0))


def test_blocks_of_paths() -> None:
    assert block_of(f"{BLOCK}.attn1.to_out.0") == block_of(f"{BLOCK}.ff.net.0.proj") == BLOCK
    assert block_of("mid_block.resnets.1.conv1") == "mid_block.resnets.1"
    assert block_of("up_blocks.0.upsamplers.0.conv") == "up_blocks.0.upsamplers.0"
    assert block_of("down_blocks.0.attentions.1.proj_in") == "down_blocks.0.attentions.1"
    assert block_of("single_transformer_blocks.7.proj_mlp") == "single_transformer_blocks.7"
    assert block_of("conv_in") == ""


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: milora(router="token"), "need a gate that all share"),  # type: ignore[arg-type]
        (lambda: milora(num_experts=2), "need a gate that all share"),
        (lambda: milora(top_k=-1), "top_k=-1 is no number of experts"),
        (lambda: mor(top_k=2), "only the gates of a prompt or timestep"),
        (lambda: moe_lora(router="prompt", num_experts=3, top_k=4), "top_k=4 exceeds num_experts=3"),
    ],
)
def test_what_means_nothing_is_refused(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()
