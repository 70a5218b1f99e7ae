"""The fast training path: the same outputs and gradients as the plain formula, and less kept for backward."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nora_diffusion.adapters import NoraLayer, dora, dylora, lora, lora_mini, lora_xs, melora, mora, nora, nora_input
from nora_diffusion.adapters.config import AdapterConfig
from nora_diffusion.adapters.deltas import chain as chain_module
from nora_diffusion.adapters.deltas.fused import chained_linear
from nora_diffusion.adapters.deltas.working import WorkingCopies
from nora_diffusion.adapters.tuner import layer as layer_module
from nora_diffusion.training.step.memory import saved_storages

D_OUT, D_IN, TOKENS = 10, 12, 7
CHAINS = {
    "nora": nora(r=6, inner_r=2, alpha=3.0, basis="svd"),
    "nora-dense": nora(r=6, core="dense", basis="svd"),
    "nora-diagonal": nora(r=6, core="diagonal", basis="svd", alpha=2.0),
    "nora-all-trained": nora(r=6, inner_r=2, basis="svd", alpha=12.0, trained=["down", "core", "up"]),
    "nora-core-and-up": nora(r=6, inner_r=2, basis="svd", trained=["core", "up"]),
    "nora_input": nora_input(r=6, inner_r=3, basis="svd", alpha=1.5),
    "lora": lora(r=4, alpha=2.0),
    "lora-up-only": lora(r=4, trained=["up"]),
    "lora_xs": lora_xs(r=4),
    "lora_mini": lora_mini(r=6, inner_r=2),
    "mora": mora(r=4),
    "dylora": dylora(r=4),
}


def frozen_linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(D_IN, D_OUT, bias=bias).double().requires_grad_(False)


def layer_with(config: AdapterConfig, base: nn.Linear) -> NoraLayer:
    layer = NoraLayer(base)
    layer.update_layer("x", config, "m")
    layer.double()
    for parameter in layer.delta("x").parameters():
        parameter.data.normal_()
    return layer


def outcome(layer: NoraLayer, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and the gradients of the input and of every factor, for a fixed loss."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return y.detach(), {"x": x.grad, **{name: g.clone() for name, g in grads.items()}}  # type: ignore[dict-item]


def plainly(run: Callable[[], Any]) -> Any:
    """Run without the fast path."""
    with mock.patch.object(layer_module, "is_plain_linear", lambda _: False):
        return run()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("config", CHAINS.values(), ids=CHAINS)
def test_outputs_and_gradients_equal_the_plain_path(config: AdapterConfig, bias: bool) -> None:
    torch.manual_seed(0)
    layer = layer_with(config, frozen_linear(bias))
    x = torch.randn(2, TOKENS, D_IN, dtype=torch.float64)
    with mock.patch.object(chain_module, "chained_linear", wraps=chained_linear) as fast:
        y, grads = outcome(layer, x)
        assert fast.call_count == 1
    expected, plain_grads = plainly(lambda: outcome(layer, x))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert grads.keys() == plain_grads.keys() and len(grads) > 1
    for name, grad in grads.items():
        torch.testing.assert_close(grad, plain_grads[name], rtol=1e-12, atol=1e-12)


def test_gradients_equal_finite_differences() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(5, 4).double(), torch.randn(5).double()
    shapes = {"x": (3, 4), "down": (3, 4), "lower": (2, 3), "upper": (3, 2), "up": (5, 3)}
    factors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes.values()]

    def run(x: Tensor, down: Tensor, lower: Tensor, upper: Tensor, up: Tensor) -> Tensor:
        return chained_linear(x, weight, bias, [down, lower], [upper, up], 0.7, WorkingCopies())

    assert torch.autograd.gradcheck(run, factors)


def test_a_sampled_rank_trains_the_rows_of_that_rank_only() -> None:
    layer = layer_with(dylora(r=4), frozen_linear())
    delta: Any = layer.delta("x")
    delta.sampled_rank = 2
    x = torch.randn(3, D_IN, dtype=torch.float64)
    y, grads = outcome(layer, x)
    expected = layer.base_layer(x) + x @ delta.A[:2].T @ delta.B[:, :2].T
    torch.testing.assert_close(y, expected)
    assert grads["nora_delta.x.A"][2:].abs().sum() == 0 < grads["nora_delta.x.A"][:2].abs().sum()


def kept_bytes(layer: NoraLayer, x: Tensor) -> int:
    """Bytes kept for backward that are neither the input nor a factor."""
    with saved_storages((x, *layer.parameters(), *layer.buffers())) as saved:
        y = layer(x)
    assert y.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("method", ["nora", "lora_xs", "mora"])
def test_a_frozen_outer_pair_keeps_only_the_input_in_the_basis(method: str) -> None:
    """And behind the lower half of a nested core."""
    layer = layer_with(CHAINS[method], frozen_linear()).bfloat16()
    x = torch.randn(64, D_IN, dtype=torch.bfloat16)
    delta: Any = layer.delta("x")
    inner = len(delta.core.A_in) if method == "nora" else 0
    assert kept_bytes(layer, x) == 2 * 64 * (len(delta.outer[0]) + inner)


class WideTensors(TorchDispatchMode):
    """Counts the new storages of at least ``size`` elements."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.held = size, dict[int, Tensor]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        new = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.numel() >= self.size]
        # Held, so that no later storage gets the address of a freed one.
        self.held |= {t.untyped_storage()._cdata: t for t in new if t.untyped_storage()._cdata not in given}
        return out


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", ["nora", "nora_input", "lora", "lora_xs"])
def test_a_training_step_allocates_no_wide_tensor_that_the_frozen_layer_does_not(method: str, autocast: bool) -> None:
    """No pass over ``[tokens, d_out]`` or ``[tokens, d_in]`` for a scale, a cast or a sum."""
    layer = layer_with(CHAINS[method], frozen_linear()).float()
    x = torch.randn(64, D_IN, requires_grad=True)

    def wide(module: nn.Module) -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            module(x)  # casts of frozen factors are made once
            with WideTensors(64 * min(D_IN, D_OUT)) as new:
                y = module(x)
        dy = torch.ones_like(y)
        with new:
            y.backward(dy)
        return len(new.held)

    frozen = wide(layer.base_layer)
    assert wide(layer) <= frozen
    assert plainly(lambda: wide(layer)) > frozen


def test_copies_of_frozen_factors_follow_them_and_end_with_the_training() -> None:
    torch.manual_seed(0)
    layer = layer_with(CHAINS["nora"], frozen_linear()).float()
    delta: Any = layer.delta("x")
    x = torch.randn(64, D_IN)

    def image() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return outcome(layer, x)[0]

    first = image()
    copies = [copy for _, copy in delta.copies._kept.values()]
    assert torch.equal(image(), first) and len(copies) == 2
    assert all(a is b for a, (_, b) in zip(copies, delta.copies._kept.values(), strict=True))
    assert not deepcopy(delta).copies._kept
    with torch.no_grad():
        delta.B_out.mul_(-1)
    bias = layer.base_layer.bias.detach()
    plain = F.linear(x.bfloat16(), layer.base_layer.weight.bfloat16(), bias.bfloat16())
    assert (image() - plain + (first - plain)).abs().max() < 0.05 * first.abs().max()
    layer.eval()
    assert not delta.copies._kept


def test_copies_have_the_set_rank() -> None:
    layer = layer_with(CHAINS["lora-up-only"], frozen_linear()).float()
    delta: Any = layer.delta("x")
    x = torch.randn(3, D_IN)
    with torch.autocast("cpu", torch.bfloat16):
        for rank in (4, 2, 3):
            delta.rank = rank
            torch.testing.assert_close(layer(x), plainly(lambda: layer(x)), rtol=0.03, atol=0.03)


def test_a_trained_factor_is_read_in_every_pass() -> None:
    """Also after a write that autograd does not count, as some optimizers make it."""
    layer = layer_with(lora(r=4), frozen_linear()).float()
    delta: Any = layer.delta("x")
    x = torch.randn(3, D_IN)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        delta.A.data.zero_()
        assert torch.equal(layer(x), layer.base_layer(x))


def test_a_trained_down_factor_keeps_the_input_in_autocast_once() -> None:
    layer = layer_with(lora(r=4), frozen_linear()).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert kept_bytes(layer, torch.randn(64, D_IN)) == 2 * 64 * (D_IN + 4)


def test_autocast_gives_its_dtype_and_gradients_in_fp32() -> None:
    torch.manual_seed(0)
    layer = layer_with(CHAINS["nora"], frozen_linear()).float()
    x = torch.randn(64, D_IN)
    expected, plain_grads = plainly(lambda: outcome(layer, x))
    with torch.autocast("cpu", torch.bfloat16):
        y, grads = outcome(layer, x)
    assert y.dtype == torch.bfloat16 and {g.dtype for g in grads.values()} == {torch.float32}
    assert (y.float() - expected).norm() < 0.02 * expected.norm()
    for name, grad in grads.items():
        assert (grad - plain_grads[name]).norm() < 0.03 * plain_grads[name].norm(), name


def test_the_meta_device_has_no_autocast() -> None:
    """The trainer estimates its memory there before it starts."""
    layer = layer_with(CHAINS["nora"], frozen_linear()).to("meta")
    assert layer(torch.empty(7, D_IN, dtype=torch.float64, device="meta")).shape == (7, D_OUT)
    layer.float()
    assert layer(torch.empty(7, D_IN, device="meta")).dtype == torch.float32


def _hooked(layer: NoraLayer) -> None:
    layer.base_layer.register_forward_hook(lambda module, args, output: output * 1)


def _replaced_forward(layer: NoraLayer) -> None:
    layer.base_layer.forward = layer.base_layer.forward  # as offloading and casting hooks do


def _trained_base(layer: NoraLayer) -> None:
    layer.base_layer.weight.requires_grad_(True)  # type: ignore[union-attr]


def _second_adapter(layer: NoraLayer) -> None:
    layer.update_layer("y", lora(r=2), "m")
    layer.double()


@pytest.mark.parametrize("change", [_hooked, _replaced_forward, _trained_base, _second_adapter])
def test_what_a_plain_product_does_not_cover_takes_the_plain_path(change: Callable[[NoraLayer], None]) -> None:
    layer = layer_with(CHAINS["nora"], frozen_linear())
    change(layer)
    with mock.patch.object(chain_module, "chained_linear") as fast:
        layer(torch.randn(3, D_IN, dtype=torch.float64))
    assert not fast.called


@pytest.mark.parametrize("config", [dora(r=2), nora(r=4, basis="svd", dropout=0.5), melora(r=4, blocks=2)])
def test_other_deltas_take_the_plain_path(config: AdapterConfig) -> None:
    layer = layer_with(config, frozen_linear())
    with mock.patch.object(chain_module, "chained_linear") as fast:
        layer(torch.randn(3, D_IN, dtype=torch.float64))
    assert not fast.called


def test_an_input_without_gradient_costs_no_product_with_the_frozen_weight() -> None:
    layer = layer_with(CHAINS["nora"], frozen_linear())
    y = layer(torch.randn(3, D_IN, dtype=torch.float64))
    y.sum().backward()
    assert all(p.grad is not None for p in layer.delta("x").parameters())


def test_checkpointed_layers_recompute_the_same_gradients() -> None:
    layer = layer_with(CHAINS["nora"], frozen_linear())
    x = torch.randn(3, D_IN, dtype=torch.float64)
    _, expected = outcome(layer, x)
    inputs = x.detach().requires_grad_()
    layer.zero_grad()
    y = torch.utils.checkpoint.checkpoint(layer, inputs, use_reentrant=False)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    torch.testing.assert_close(inputs.grad, expected["x"], rtol=0, atol=0)


def test_a_second_derivative_is_refused_in_words() -> None:
    layer = layer_with(CHAINS["nora"], frozen_linear())
    x = torch.randn(3, D_IN, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(F.silu(layer(x)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
