"""The inference path: any number of live chains cost one product down and one up, and are never out of date."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from nora_diffusion.adapters import NoraLayer, dora, dylora, lora, mor, nora, nora_input
from nora_diffusion.adapters.deltas.joining import joined_pair
from nora_diffusion.adapters.tuner import live_pair as live_pair_module

WIDTH = 12


def layer_of(configs: dict[str, Any], base: nn.Module | None = None) -> NoraLayer:
    """A layer with these adapters, all live, with random factors."""
    torch.manual_seed(0)
    layer = NoraLayer((base or nn.Linear(WIDTH, WIDTH)).requires_grad_(False).double())
    for name, config in configs.items():
        layer.update_layer(name, config, "m")
    layer.double().eval()
    for parameter in layer.nora_delta.parameters():
        parameter.data.normal_()
    layer.activate(list(configs))
    return layer


def dense(layer: NoraLayer, x: Tensor) -> Tensor:
    """``W x + b + sum_k s_k B_k A_k x``."""
    y = layer.base_layer(x)
    for name in layer.live_names():
        down, up = layer.delta(name).pair()
        y = y + layer.scaling[name] * x @ down.T @ up.T
    return y  # type: ignore[no-any-return]


PRESETS: dict[str, list[Any]] = {"nora": [nora], "nora_input": [nora_input], "both": [nora, nora_input, nora]}


def in_one_basis(count: int, r: int = 6, presets: str = "nora") -> NoraLayer:
    kinds = PRESETS[presets]
    layer = layer_of({f"s{i}": kinds[i % len(kinds)](r=r, inner_r=2, basis="svd", alpha=3.0) for i in range(count)})
    basis = dict(layer.delta("s0").named_buffers())
    for i in range(1, count):
        delta = layer.delta(f"s{i}")
        for name, _ in list(delta.named_buffers()):
            setattr(delta, name, basis[name])
    return layer


@pytest.mark.parametrize("presets", PRESETS)
@pytest.mark.parametrize("count", [1, 2, 3, 8, 32])
def test_chains_of_one_basis_are_summed_inside_it(count: int, presets: str) -> None:
    layer, x = in_one_basis(count, presets=presets), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense(layer, x), rtol=1e-12, atol=1e-10)
    chains = list(layer.joined_chains([]).values()) or [(layer.scaling[n], layer.delta(n)) for n in layer.live_names()]
    assert len(joined_pair(chains)[0]) == min(2 * count, 6)


FEW, MANY = 5, 7
"""Tokens: below and from ``W``'s number of values over that of a token of ``x`` and ``y``, 12 * 12 / 24 = 6."""


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize(("tokens", "products"), [(FEW, 3), (MANY, 2)])
def test_any_number_of_adapters_takes_few_products(tokens: int, products: int, count: int) -> None:
    """``W x``, ``A x`` and ``y += B p``; or, where there are many tokens, ``W + B A`` and its product with ``x``."""
    configs = {f"s{i}": lora(r=2 + i) if i % 2 else nora(r=4, inner_r=2, basis="orthogonal") for i in range(count)}
    layer, x = layer_of(configs), torch.randn(1, tokens, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense(layer, x), rtol=1e-12, atol=1e-10)
        with torch.profiler.profile() as profile:
            layer(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    found = {key: n for key, n in counts.items() if key in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")}
    assert sum(found.values()) == products, found


@pytest.mark.parametrize("size", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adding_to_the_weight_is_as_accurate_as_adding_to_the_output(dtype: torch.dtype, size: float) -> None:
    """``size``: of the update beside ``W``."""
    layer = NoraLayer(nn.Linear(64, 64, bias=False).requires_grad_(False))
    layer.update_layer("one", nora(r=8, inner_r=4, basis="orthogonal"), "m")
    layer = layer.to(dtype).eval()
    for parameter in layer.nora_delta.parameters():
        parameter.data.normal_()
    change = layer.get_delta_weight("one")
    layer.set_scale("one", size * float((layer.base_layer.weight.float().norm() / change.norm()).detach()))
    x = torch.randn(256, 64).to(dtype)
    exact = x.double() @ (layer.base_layer.weight.double() + layer.get_delta_weight("one").double()).T
    with torch.no_grad():
        assert layer.folds(x, dtype) and not layer.folds(x[:16], dtype)
        to_weight, to_output = layer(x), torch.cat([layer(rows) for rows in x.split(16)])
    error, other = ((y.double() - exact).norm() for y in (to_weight, to_output))
    assert 0 < error < 1.15 * other


def test_what_is_not_in_the_dtype_of_the_pass_is_not_added_to_the_weight() -> None:
    layer, x = layer_of({"one": lora(r=2)}).float(), torch.randn(MANY, WIDTH)
    assert layer.folds(x, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not layer.folds(x, torch.bfloat16)
        torch.testing.assert_close(layer(x).double(), dense(layer, x).double(), rtol=0.05, atol=0.2)


def test_what_has_no_single_pair_is_added_beside_it() -> None:
    configs = {"one": nora(r=4, basis="svd"), "dora": dora(r=2), "mor": mor(r=2, num_experts=2), "two": lora(r=2)}
    layer, x = layer_of(configs), torch.randn(3, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        total, base = layer(x), layer.base_layer(x)
        parts = []
        for name in configs:
            layer.activate([name])
            parts.append(layer(x) - base)
    torch.testing.assert_close(total, base + sum(parts))


def test_convolutions() -> None:
    layer = layer_of({"one": nora(r=4, basis="svd"), "two": lora(r=2)}, nn.Conv2d(3, 8, 3, padding=1))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    weight = layer.base_layer.weight + sum(layer.get_delta_weight(n).double() for n in ("one", "two"))  # type: ignore[operator]
    with torch.no_grad():
        expected = nn.functional.conv2d(x, weight, layer.base_layer.bias, padding=1)  # type: ignore[arg-type]
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)  # dW is computed in fp32


def _optimizer_step(layer: NoraLayer) -> None:
    for parameter in layer.delta("one").parameters():
        parameter.data.add_(1.0)
        parameter.add_(1.0)


def _replaced_data(layer: NoraLayer) -> None:
    for parameter in layer.delta("one").parameters():
        parameter.data = parameter.data + 1.0


def _replaced_parameter(layer: NoraLayer) -> None:
    core: Any = layer.delta("one").core  # type: ignore[union-attr]
    core.A_in = nn.Parameter(core.A_in + 1.0)


def _loaded_state(layer: NoraLayer) -> None:
    state = {key: value + 1.0 for key, value in layer.state_dict().items() if "nora_delta.one" in key}
    layer.load_state_dict(state, strict=False)


def _assigned_state(layer: NoraLayer) -> None:
    state = {key: value + 1.0 for key, value in layer.state_dict().items() if "nora_delta.one" in key}
    layer.load_state_dict(state, strict=False, assign=True)


def _changed_basis(layer: NoraLayer) -> None:
    layer.delta("one").get_buffer("A_out").mul_(2.0)


CHANGES: list[Callable[[NoraLayer], None]] = [
    _optimizer_step,
    _replaced_data,
    _replaced_parameter,
    _loaded_state,
    _assigned_state,
    _changed_basis,
    lambda layer: layer.set_scale("one", 0.3),
    lambda layer: layer.set_scale("one", 0.0),
    lambda layer: layer.activate(["two"]),
    lambda layer: layer.activate(["two", "one"]),
    lambda layer: layer.delete_adapter("one"),
    lambda layer: layer.update_layer("three", lora(r=2), "m") or layer.double(),  # type: ignore[func-returns-value]
    lambda layer: setattr(layer.delta("one"), "rank", 1),
    lambda layer: layer.scale_layer(0.5),
    lambda layer: layer.enable_adapters(False),
    lambda layer: layer.float() and layer.double(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_the_cached_pair_follows_every_change(change: Callable[[NoraLayer], object]) -> None:
    layer = layer_of({"one": nora(r=4, inner_r=2, basis="svd"), "two": lora(r=2)})
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        before = layer(x)
        torch.testing.assert_close(before, dense(layer, x))
        change(layer)
        torch.testing.assert_close(layer(x), dense(layer, x))


def test_the_pair_is_formed_once_for_many_passes() -> None:
    layer, x = in_one_basis(3), torch.randn(3, WIDTH, dtype=torch.float64)
    with mock.patch.object(live_pair_module, "joined_pair", wraps=joined_pair) as formed, torch.no_grad():
        for _ in range(4):
            layer(x)
        assert formed.call_count == 1
        layer.set_scale("s1", 0.5)
        layer(x)
        layer(x)
        assert formed.call_count == 2


def test_an_output_that_a_hook_keeps_is_not_overwritten() -> None:
    layer, x = in_one_basis(2), torch.randn(3, WIDTH, dtype=torch.float64)
    kept: list[Tensor] = []
    layer.base_layer.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        y = layer(x)
        torch.testing.assert_close(kept[0], nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias))  # type: ignore[arg-type]
    assert not torch.equal(y, kept[0])


def test_a_sampled_rank_is_not_cached() -> None:
    layer, x = layer_of({"one": dylora(r=4)}), torch.randn(3, WIDTH, dtype=torch.float64)
    delta: Any = layer.delta("one")
    layer.train()
    delta.sampled_rank = 1
    with torch.no_grad():
        expected = layer.base_layer(x) + x @ delta.A[:1].T @ delta.B[:, :1].T
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_pair_formed_in_one_mode_serves_the_other(mode: Any) -> None:
    layer, x = in_one_basis(2), torch.randn(3, WIDTH, dtype=torch.float64)
    with torch.inference_mode():
        first = layer(x)
    with mode():
        torch.testing.assert_close(layer(x), first)
    y = layer(x.requires_grad_())
    y.sum().backward()
    assert x.grad is not None
