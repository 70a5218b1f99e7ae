"""What both optimizers share: stacks, other parameters, state, dtypes, missing gradients."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nora_diffusion.optimizers import LoRAPro, LoRARite, Pair, pairs_of

Build = Callable[..., torch.optim.Optimizer]
KINDS: dict[str, Build] = {"full": LoRAPro, "factors": partial(LoRAPro, moments="factors"), "rite": LoRARite}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
SHAPES = [(3, 8, 6), (3, 8, 6), (2, 8, 6), (3, 8, 6), (1, 4, 5)]


class Layers(nn.Module):
    """``B A`` of several shapes, scales and magnitudes, a block-diagonal one, a convolution, and a vector."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(0)

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=source, dtype=torch.float64).to(dtype))

        self.layers = nn.ModuleList()
        for number, (r, d_in, d_out) in enumerate(SHAPES):
            layer = nn.Module()
            layer.lora_A, layer.lora_B = new(r, d_in), new(d_out, r)
            layer.lora_A.data *= 10.0**-number
            self.layers.append(layer)
        self.blocks, self.conv = nn.Module(), nn.Module()
        self.blocks.lora_A, self.blocks.lora_B = new(4, 3), new(6, 2)
        self.conv.lora_A, self.conv.lora_B = new(2, 3, 2, 2), new(5, 2, 1, 1)
        self.vector = new(7)

    def gradients(self, step: int) -> None:
        source = torch.Generator().manual_seed(step)
        for parameter in self.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=source, dtype=torch.float64).to(parameter)


def optimizer_of(layers: Layers, kind: Build, **options: Any) -> torch.optim.Optimizer:
    pairs, others = pairs_of(layers.named_parameters(), scale=0.5)
    return kind([*pairs, *others], lr=0.01, **options)


def run(layers: Layers, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        layers.gradients(step)
        optimizer.step()


def values(layers: Layers) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in layers.parameters()]


@every_kind
def test_pairs_are_stepped_together_as_one_by_one(kind: Build) -> None:
    together, alone = Layers(), Layers()
    run(together, optimizer_of(together, kind), range(4))
    pairs, others = pairs_of(alone.named_parameters(), scale=0.5)
    optimizers = [kind([item], lr=0.01) for item in (*pairs, *others)]
    for step in range(4):
        alone.gradients(step)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.allclose(a, b, rtol=1e-9, atol=0) for a, b in zip(values(together), values(alone), strict=True))


@every_kind
def test_blocks_are_pairs_of_their_own(kind: Build) -> None:
    """The stacked factors of MELoRA against the pairs on the diagonal, and a convolution against its matrices."""
    layers = Layers()
    a, b = layers.blocks.lora_A, layers.blocks.lora_B
    single = [
        (nn.Parameter(x.detach().clone()), nn.Parameter(y.detach().clone()))
        for x, y in zip(a.chunk(2), b.chunk(2), strict=True)
    ]
    c, d = (nn.Parameter(factor.detach().flatten(1).clone()) for factor in layers.conv.parameters())
    whole, parts = optimizer_of(layers, kind), kind([Pair(*pair, 0.5) for pair in [*single, (c, d)]], lr=0.01)
    for step in range(3):
        layers.gradients(step)
        for (x, y), gx, gy in zip(single, a.grad.chunk(2), b.grad.chunk(2), strict=True):
            x.grad, y.grad = gx.clone(), gy.clone()
        c.grad, d.grad = (factor.grad.flatten(1).clone() for factor in layers.conv.parameters())
        whole.step()
        parts.step()
    assert torch.allclose(a, torch.cat([x for x, _ in single])) and torch.allclose(b, torch.cat([y for _, y in single]))
    assert torch.allclose(layers.conv.lora_A.flatten(1), c) and torch.allclose(layers.conv.lora_B.flatten(1), d)


@every_kind
def test_other_parameters_are_stepped_by_adamw(kind: Build) -> None:
    layers, other = Layers(), Layers()
    run(layers, optimizer_of(layers, kind, weight_decay=0.1), range(3))
    run(other, torch.optim.AdamW([other.vector], lr=0.01, weight_decay=0.1), range(3))
    assert torch.equal(layers.vector, other.vector)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_dict_continues_bit_for_bit(kind: Build, dtype: torch.dtype) -> None:
    """Also where parameters are in half precision and their state in fp32; a copy shares nothing with the original."""
    whole, halves = Layers(dtype), Layers(dtype)
    run(whole, optimizer_of(whole, kind), range(5))
    first = optimizer_of(halves, kind)
    run(halves, first, range(2))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    continued = copy.deepcopy(halves)
    second = optimizer_of(continued, kind)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    run(halves, first, range(2, 4))
    run(continued, second, range(2, 5))
    assert all(torch.equal(a, b) for a, b in zip(values(whole), values(continued), strict=True))


@every_kind
def test_a_pair_without_gradients_is_skipped_and_continues(kind: Build) -> None:
    """Its steps are counted by itself, so that it equals a pair of its own that never paused."""
    layers, alone = Layers(), Layers()
    optimizer = optimizer_of(layers, kind)
    paused = layers.layers[1]
    own = kind([Pair(*alone.layers[1].parameters(), 0.5)], lr=0.01)
    for step in range(4):
        layers.gradients(step)
        alone.gradients(step)
        if step == 1:
            paused.lora_A.grad = paused.lora_B.grad = None
            before = paused.lora_A.detach().clone()
        else:
            own.step()
        optimizer.step()
        if step == 1:
            assert torch.equal(paused.lora_A, before)
    for mine, other in zip(paused.parameters(), alone.layers[1].parameters(), strict=True):
        assert torch.allclose(mine, other, rtol=1e-9)


@every_kind
def test_zero_gradients_and_zero_factors_move_nothing(kind: Build) -> None:
    layers = Layers(torch.float32)
    with torch.no_grad():
        layers.layers[0].lora_B.zero_()
        layers.layers[3].lora_A.zero_()
        layers.layers[3].lora_B.zero_()
    before, optimizer = values(layers), optimizer_of(layers, kind, weight_decay=0.0)
    for parameter in layers.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(2):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(values(layers), before, strict=True))


@every_kind
def test_half_precision_is_computed_in_fp32(kind: Build) -> None:
    """A step of bf16 parameters is the fp32 step of the same numbers, rounded."""
    half = Layers(torch.bfloat16)
    single = copy.deepcopy(half).float()
    for layers in (half, single):
        optimizer = optimizer_of(layers, kind)
        half.gradients(0)
        for parameter, source in zip(layers.parameters(), half.parameters(), strict=True):
            parameter.grad = source.grad.to(parameter)
        optimizer.step()
    names = [name for name, _ in half.named_parameters() if "lora" in name]
    mine, other = dict(half.named_parameters()), dict(single.named_parameters())
    assert all(torch.equal(mine[name], other[name].bfloat16()) for name in names)


@every_kind
def test_the_closure_and_the_gradient_scaler(kind: Build) -> None:
    layers = Layers(torch.float32)
    optimizer = optimizer_of(layers, kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = values(layers)
    layers.gradients(0)
    layers.vector.grad.fill_(float("inf"))
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(values(layers), before, strict=True))
    assert optimizer.step(lambda: 5.0) == 5.0


def test_groups_have_rates_of_their_own() -> None:
    layers = Layers()
    pairs, others = pairs_of(layers.named_parameters())
    groups: list[Any] = [{"pairs": pairs[:2], "lr": 0.0}, {"pairs": pairs[2:], "lr_ratio": 0.0}, {"params": others}]
    optimizer = LoRAPro(groups, lr=0.01, weight_decay=0.0)
    before = values(layers)
    run(layers, optimizer, range(1))
    names = [name for name, _ in layers.named_parameters()]
    moved = {name for name, old, new in zip(names, before, values(layers), strict=True) if not torch.equal(old, new)}
    assert moved == {f"layers.{n}.lora_A" for n in (2, 3, 4)} | {"blocks.lora_A", "conv.lora_A", "vector"}
