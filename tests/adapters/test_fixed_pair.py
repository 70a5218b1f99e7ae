"""A prepared layer: one pair of tensors holds all live chains, after every change by which tools change adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nora_diffusion import UserError
from nora_diffusion.adapters import NoraLayer, lora, nora

WIDTH = 12
CONFIGS = {"one": nora(r=4, inner_r=2, basis="svd"), "two": lora(r=2), "three": lora(r=3)}


def pair_of_layers(base: nn.Module | None = None) -> tuple[NoraLayer, NoraLayer]:
    """A prepared layer and an unprepared one, equal otherwise, with two of three adapters active."""
    layers = []
    for _ in range(2):
        torch.manual_seed(0)
        layer = NoraLayer(copy.deepcopy(base or nn.Linear(WIDTH, WIDTH)).requires_grad_(False).eval())
        for name, config in CONFIGS.items():
            layer.update_layer(name, config, "m")
        for parameter in layer.nora_delta.parameters():
            parameter.data.normal_()
        layer.activate(["one", "two"])
        layers.append(layer.eval())
    layers[0].prepare("m", 8)
    return layers[0], layers[1]


def filled(layer: NoraLayer) -> None:
    values = {name: torch.full_like(value, 0.3) for name, value in layer.nora_delta.state_dict().items()}
    layer.load_state_dict({f"nora_delta.{name}": value for name, value in values.items()}, strict=False)


def trained(layer: NoraLayer) -> None:
    layer.train()
    with torch.no_grad():
        for parameter in layer.nora_delta.parameters():
            parameter.mul_(0.5)
    layer.eval()


CHANGES: dict[str, Callable[[NoraLayer], Any]] = {
    "other adapters": lambda layer: layer.set_adapter(["two", "three"]),
    "weight": lambda layer: layer.set_scale("three", 0.3),
    "both": lambda layer: layer.set_weights({"one": -1.0, "three": 0.5}),
    "scale": lambda layer: layer.scale_layer(0.7),
    "scale back": lambda layer: layer.unscale_layer(0.7),
    "scale reset": lambda layer: layer.unscale_layer(),
    "off": lambda layer: layer.enable_adapters(False),
    "on": lambda layer: layer.enable_adapters(True),
    "filled": filled,
    "trained": trained,
    "merged": lambda layer: layer.merge(adapter_names=["one"]),
    "merged and deleted": lambda layer: layer.delete_adapter("one"),
    "deleted": lambda layer: [layer.delete_adapter(name) for name in ("two", "three")],
    "added": lambda layer: layer.update_layer("two", CONFIGS["two"], "m"),
}


def same(layer: Callable[[Tensor], Tensor], other: NoraLayer, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), other(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_no_change_is_missed_and_none_compiles_again(kind: str) -> None:
    base = nn.Conv2d(3, WIDTH, 2, stride=2, padding=1) if kind == "conv" else nn.Linear(WIDTH, WIDTH)
    shape = (2, 3, 5, 5) if kind == "conv" else (2, 3, WIDTH)
    (layer, plain), graphs = pair_of_layers(base), list[int]()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=lambda graph, _: graphs.append(1) or graph.forward)
    for change in (lambda _: None, *CHANGES.values()):
        change(layer)
        change(plain)
        same(layer, plain, shape)
        same(compiled, plain, shape)
    assert len(graphs) == 2  # one of them for the pass in which an adapter is merged
    torch._dynamo.reset()


def test_a_set_that_does_not_fit_is_refused_and_still_right() -> None:
    """PEFT's verbs change one layer after the other: a layer whose set was refused computes it without its pair."""
    layer, plain = pair_of_layers()
    layer.prepare("some.path", 4)
    with pytest.raises(UserError, match=r"some\.path: these adapters together have rank 7, but .* prepared for 4"):
        layer.set_adapter(list(CONFIGS))
    plain.set_adapter(list(CONFIGS))
    same(layer, plain, (2, WIDTH))
    layer.set_adapter("two")
    plain.set_adapter("two")
    same(layer, plain, (2, WIDTH))


def test_a_pass_with_gradients_trains_the_factors() -> None:
    layer, plain = pair_of_layers()
    x = torch.randn(4, WIDTH)
    for one in (layer, plain):
        one(x).square().sum().backward()
    for ours, theirs in zip(layer.nora_delta.parameters(), plain.nora_delta.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)
