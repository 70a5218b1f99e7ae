"""Mixtures on the fast training path: the outputs and gradients of the plain path, and less kept for backward."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from nora_diffusion.adapters import AdapterConfig, NoraLayer, malora, moe_lora, mor
from nora_diffusion.adapters.config import Start
from nora_diffusion.adapters.deltas.routed import RoutedDelta, RouterInputs
from nora_diffusion.adapters.tuner import layer as layer_module
from nora_diffusion.training.step.memory import saved_storages

D_OUT, D_IN, TOKENS, N = 10, 12, 7, 3
KINDS: dict[str, Callable[..., AdapterConfig]] = {
    "shared": lambda **axes: mor(r=4, num_experts=N, alpha=2.0, **axes),
    "independent": lambda **axes: moe_lora(r=2, num_experts=N, alpha=4.0, **axes),
    "projected": lambda **axes: malora(r=4, inner_r=2, num_experts=N, alpha=2.0, **axes),
}
ROUTERS = ("token", "prompt")


def layer_with(config: AdapterConfig, base: nn.Module, dtype: torch.dtype = torch.float64) -> NoraLayer:
    layer = NoraLayer(base.to(dtype).requires_grad_(False))
    config.start = Start(condition=5)
    layer.update_layer("x", config, "m")
    layer.to(dtype)
    delta = layer.delta("x")
    assert isinstance(delta, RoutedDelta)
    for parameter in delta.parameters():
        parameter.data.normal_()
    delta.router_inputs = RouterInputs()
    delta.router_inputs.open({"prompt": torch.randn(2, 5, dtype=dtype)})
    return layer


def outcome(layer: NoraLayer, x: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of the input and of every factor, for a fixed loss."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}  # type: ignore[dict-item]


@pytest.mark.parametrize("shape", [(2, TOKENS, D_IN), (2, D_IN), (2, 3, 2, D_IN)], ids=str)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_equal_the_plain_path(kind: str, router: str, shape: tuple[int, ...]) -> None:
    layer = layer_with(KINDS[kind](router=router), nn.Linear(D_IN, D_OUT))
    x = torch.randn(shape, dtype=torch.float64)
    with mock.patch.object(RoutedDelta, "linear", autospec=True, side_effect=RoutedDelta.linear) as fast:
        found = outcome(layer, x)
        assert fast.call_count == 1
    with mock.patch.object(layer_module, "is_plain_linear", lambda _: False):
        expected = outcome(layer, x)
    assert found.keys() == expected.keys() and len(found) == 2 + len(list(layer.delta("x").parameters()))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_limits_of_differences(kind: str, router: str) -> None:
    layer = layer_with(KINDS[kind](router=router), nn.Linear(D_IN, D_OUT))
    x = torch.randn(2, 2, D_IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.delta("x").parameters()))


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_other_layers_and_dropout_take_the_plain_path(kind: str, router: str) -> None:
    layers = [
        layer_with(KINDS[kind](router=router), nn.Conv2d(D_IN, D_OUT, 1)),
        layer_with(KINDS[kind](router=router, dropout=0.5), nn.Linear(D_IN, D_OUT)),
    ]
    inputs = [torch.randn(2, D_IN, 3, 3).double(), torch.randn(2, TOKENS, D_IN).double()]
    with mock.patch.object(RoutedDelta, "linear", autospec=True, side_effect=RoutedDelta.linear) as fast:
        for layer, x in zip(layers, inputs, strict=True):
            outcome(layer, x)
        assert fast.call_count == 0
        outcome(layers[1].eval(), inputs[1])
        assert fast.call_count == 1


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_master_factors(kind: str, router: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = layer_with(KINDS[kind](router=router), nn.Linear(D_IN, D_OUT), torch.float32)
    x = torch.randn(2, TOKENS, D_IN)
    expected = outcome(layer, x)
    with torch.autocast("cpu", dtype):
        found = outcome(layer, x)
    assert found["y"].dtype == dtype
    for name, value in found.items():
        assert name == "y" or value.dtype == torch.float32
        assert (value - expected[name]).norm() < 0.1 * expected[name].norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_the_input_and_its_low_rank_image(kind: str) -> None:
    """In half precision no copy of a factor, weight or input is kept beside them."""
    layer = layer_with(KINDS[kind](), nn.Linear(D_IN, D_OUT), torch.float32)
    layer.base_layer.bfloat16()
    x = torch.randn(500, D_IN, dtype=torch.bfloat16, requires_grad=True)
    with saved_storages((x, *layer.parameters())) as saved, torch.autocast("cpu", torch.bfloat16):
        layer(x)
    kept = sum(storage.nbytes() for storage in saved.values())
    width = {"shared": 4 + N, "independent": 2 * N + N, "projected": 2 * N + N}[kind]
    collapsed = 4 * 2 * N * D_IN if kind == "projected" else 0
    assert 2 * 500 * width <= kept <= 2 * 500 * width + 2 * collapsed
