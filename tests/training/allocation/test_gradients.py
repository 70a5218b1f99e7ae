"""Gradients of dense cores: those of the weights themselves, projected, in a pass that changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import randomize

from nora_diffusion import AdapterConfig, UserError, add_adapter
from nora_diffusion.adapters import lora, lora_mini, nora, nora_input
from nora_diffusion.adapters.shapes import factor_shapes, inner_rank, inner_rank_cost
from nora_diffusion.adapters.tuner.build import flat_weight
from nora_diffusion.pipelines.components import nora_layers
from nora_diffusion.training.allocation.gradients import core_gradients
from nora_diffusion.training.allocation.inner_ranks import inner_ranks

TARGETS = ["attn", "ff", "conv"]
CONFIGS: dict[str, Callable[[], AdapterConfig]] = {
    "nora": lambda: nora(r=4, inner_r=2, alpha=2.0, basis="svd", target_modules=TARGETS),
    "blocks": lambda: nora(r=4, inner_r=2, basis="svd", blocks=2),
    "nora_input": lambda: nora_input(r=4, inner_r=2, alpha=3.0, basis="svd", target_modules=TARGETS),
    "lora_mini": lambda: lora_mini(r=4, inner_r=2, rank_pattern={"to_q": 3}),
}


def loss_of(pipe: Any, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    out = pipe.unet(torch.randn(2, 4, 8, 8), 3, torch.randn(2, 5, 16)).sample
    return out.square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_the_weights_between_the_outer_pair(pipe: Any, name: str) -> None:
    """``s B_out^T (dL/dW) A_out^T`` in fp32, without another adapter that is active."""
    add_adapter(pipe, CONFIGS[name](), "one")
    add_adapter(pipe, lora(r=2), "other")
    randomize(pipe, "other")
    layers = nora_layers(pipe.unet, "one")
    found = core_gradients({"unet": pipe.unet}, "one", (loss_of(pipe, seed) for seed in range(2)), scale=4.0)
    assert found.keys() == {("unet", path) for path in layers}
    pipe.disable_lora()
    for layer in layers.values():
        layer.base_layer.weight.requires_grad_(True)  # type: ignore[union-attr]
    torch.autograd.backward(sum(loss_of(pipe, seed) for seed in range(2)))  # type: ignore[arg-type]
    for path, layer in layers.items():
        delta: Any = layer.delta("one")
        down, up = delta.outer
        dense = layer.base_layer.weight.grad.flatten(1) @ down.T  # type: ignore[union-attr, operator]
        wanted = layer.states["one"].native_scale * (up.T @ dense if delta.frozen_sides == 2 else dense)
        torch.testing.assert_close(found["unet", path], wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-4)


def test_measuring_changes_nothing(pipe: Any, render: Any) -> None:
    add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), "one")
    randomize(pipe)
    before = render(pipe)
    core_gradients({"unet": pipe.unet}, "one", (loss_of(pipe, seed) for seed in range(1)))
    with pytest.raises(UserError, match="are not finite"):
        core_gradients({"unet": pipe.unet}, "one", (torch.inf * loss_of(pipe, seed) for seed in range(1)))
    assert torch.equal(render(pipe), before)
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_have_the_size_of_equal_ones(pipe: Any, name: str) -> None:
    config = CONFIGS[name]()
    add_adapter(pipe, config, "one")
    modules = {"unet": pipe.unet}
    ranks = inner_ranks(modules, "one", config, core_gradients(modules, "one", (loss_of(pipe, s) for s in range(2))))
    sizes = {path: flat_weight(layer.base_layer).shape for path, layer in nora_layers(pipe.unet, "one").items()}
    assert ranks.keys() == sizes.keys() and len(set(ranks.values())) > 1
    spent = total = 0
    largest = 0
    for path, size in sizes.items():
        r = min(config.rank_for(path), *size)
        cost = inner_rank_cost(config, size, r)
        assert 1 <= ranks[path] <= r
        spent, total = spent + cost * ranks[path], total + cost * inner_rank(config, r, path)
        largest = max(largest, cost)
        shapes = factor_shapes(config, size, None, path, 0)
        trained = [shape for factor, shape in shapes.items() if factor in ("A_in", "B_in", "B")]
        assert sum(a * b for a, b in trained) == cost * inner_rank(config, r, path)  # type: ignore[misc]
    assert total - largest < spent <= total
