"""A fingerprint is computed once for a weight that stays, and again after any change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nora_diffusion.pipelines import fingerprints
from nora_diffusion.pipelines.fingerprints import fingerprint


def dense(layer: nn.Module, path: str) -> float:
    """The formula of the docstring, in fp64."""
    weight = layer.get_parameter("weight").detach().flatten(1).double()
    generator = torch.Generator().manual_seed(sum(path.encode()))
    u, v = (torch.randn(size, generator=generator).double() for size in weight.shape)
    return float(u @ weight @ v) / weight.numel() ** 0.5


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths for which a fingerprint is computed."""
    paths, compute = [], fingerprints._compute

    def record(weight: Tensor, path: str) -> float:
        paths.append(path)
        return compute(weight, path)

    monkeypatch.setattr(fingerprints, "_compute", record)
    return paths


@pytest.mark.parametrize("layer", [nn.Linear(40, 8), nn.Conv2d(3, 8, 3), nn.Linear(8, 40).bfloat16()])
def test_it_is_computed_once(computed: list[str], layer: nn.Module) -> None:
    for _ in range(3):
        assert fingerprint(layer, "block.to_q") == pytest.approx(dense(layer, "block.to_q"), rel=1e-4)
    assert computed == ["block.to_q"]
    assert fingerprint(layer, "block.to_k") == pytest.approx(dense(layer, "block.to_k"), rel=1e-4)


def replaced(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


CHANGES: dict[str, Callable[[nn.Linear], object]] = {
    "in place": lambda layer: layer.weight.detach().select(0, 0).select(0, 1).add_(1),
    "through data": lambda layer: layer.weight.data.mul_(2),
    "merged through data": lambda layer: setattr(layer.weight, "data", layer.weight.data.add_(1)),
    "new data": lambda layer: setattr(layer.weight, "data", torch.randn(8, 40)),
    "new parameter": replaced,
    "cast": lambda layer: layer.bfloat16(),
    "loaded": lambda layer: layer.load_state_dict(nn.Linear(40, 8).state_dict()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_weight_is_seen(change: Callable[[nn.Linear], object]) -> None:
    layer = nn.Linear(40, 8)
    fingerprint(layer, "to_q")
    change(layer)
    assert fingerprint(layer, "to_q") == pytest.approx(dense(layer, "to_q"), rel=1e-4)


def test_inference_tensors_are_computed_each_time(computed: list[str]) -> None:
    with torch.inference_mode():
        layer = nn.Linear(40, 8)
        fingerprint(layer, "to_q")
        layer.weight[0, 1] += 1
    assert fingerprint(layer, "to_q") == pytest.approx(dense(layer, "to_q"), rel=1e-4)
    assert computed == ["to_q", "to_q"]
