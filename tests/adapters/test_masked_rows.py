"""Adapters that act at some positions of a layer only, against the dense formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from nora_diffusion.adapters import AdapterConfig, NoraLayer, dora, lora, mor, nora
from nora_diffusion.adapters.tuner.mixed_rows import serve_rows
from nora_diffusion.adapters.tuner.row_plan import MaskedPlan

WIDTH, ROWS = 12, 4
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(WIDTH, 10), (5, WIDTH)),
    "conv": (lambda: nn.Conv2d(WIDTH, 10, 3, padding=1), (WIDTH, 3, 4)),
}
CONFIGS: dict[str, Callable[[], AdapterConfig]] = {
    "one basis": lambda: nora(r=4, inner_r=2, basis="svd"),
    "own": lambda: lora(r=3, alpha=6.0),
    "magnitude": lambda: dora(r=3),
    "routed": lambda: mor(r=4, num_experts=3),
}


class Masks(MaskedPlan):
    """Fixed masks ``[n, *positions, 1]`` by adapter; none for others."""

    def __init__(self, masks: dict[str, Tensor], names: Sequence[str]) -> None:
        super().__init__(names)
        self.masks, self.asked = masks, list[tuple[str, str, tuple[int, ...]]]()

    def mask(self, path: str, name: str, positions: Sequence[int]) -> Tensor | None:
        self.asked.append((path, name, tuple(positions)))
        return self.masks.get(name)


def model_with(kind: str, config: str) -> nn.Sequential:
    """One layer with the adapters one, two and style at the weights 0.5, 1 and 1."""
    torch.manual_seed(0)
    layer = NoraLayer(LAYERS[kind][0]().double().requires_grad_(False))
    for name in ("one", "two", "style"):
        layer.update_layer(name, CONFIGS[config](), "0")
    for parameter in layer.double().nora_delta.parameters():
        parameter.data.normal_()
    layer.set_scale("one", 0.5)
    return nn.Sequential(layer).eval()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("kind", "config"), [(k, c) for k in LAYERS for c in CONFIGS if (k, c) != ("conv", "routed")])
def test_masked_sum_is_the_formula(kind: str, config: str, grad: bool) -> None:
    """``y = W x + sum_k m_k dy_k(x)``, with ``dy_k`` the change that the adapter makes alone, at its own weight."""
    model = model_with(kind, config)
    layer = model[0]
    assert isinstance(layer, NoraLayer)
    x = torch.randn(ROWS, *LAYERS[kind][1], dtype=torch.float64)
    positions = x.shape[2:] if kind == "conv" else x.shape[1:-1]
    masks = {name: torch.rand(ROWS, *positions, 1, dtype=torch.float64) for name in ("one", "two")}
    masks["one"][:, 0], masks["two"][:, 0] = 0, 0
    plan = Masks(masks, ("one", "two", "style"))
    base = layer.base_layer(x)
    expected = base
    for name in ("one", "two", "style"):
        layer._active_adapter = [name]
        mask = masks.get(name, torch.ones(1, dtype=torch.float64))
        expected = expected + (mask.movedim(-1, 1) if kind == "conv" and mask.ndim > 1 else mask) * (model(x) - base)
    layer._active_adapter = ["one", "two", "style"]
    before = model(x)
    with torch.set_grad_enabled(grad), serve_rows(model, plan):
        found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert {(path, at) for path, _, at in plan.asked} == {("0", tuple(positions))}
    assert torch.equal(model(x), before)


def test_an_adapter_whose_mask_is_zero_changes_nothing() -> None:
    model = model_with("linear", "own")
    x = torch.randn(ROWS, 5, WIDTH, dtype=torch.float64)
    mask = torch.zeros(ROWS, 5, 1, dtype=torch.float64)
    mask[:, 2] = 1
    layer = model[0]
    assert isinstance(layer, NoraLayer)
    with torch.no_grad(), serve_rows(model, Masks({"one": mask}, ["one"])):
        found, base = model(x), layer.base_layer(x)
    changed = (found != base).any(-1)
    assert changed[:, 2].all()
    assert not changed[:, [0, 1, 3, 4]].any()
