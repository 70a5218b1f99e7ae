"""The overlap score: 0 for orthogonal updates, 1 for equal subspaces, and equal to its dense definition."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import randomize
from torch import Tensor

from nora_diffusion import UserError, add_adapter, lora, mix, mor, nora, overlap, overlap_files, save_adapter
from nora_diffusion.composition.angles import ENERGY, WARN_ABOVE
from nora_diffusion.pipelines.components import nora_layers

TARGETS = ["to_q", "to_k"]


def add(pipe: Any, *names: str, r: int = 2) -> None:
    for seed, name in enumerate(names):
        add_adapter(pipe, lora(r=r, target_modules=TARGETS), name)
        randomize(pipe, name, seed, size=1.0)


def deltas(pipe: Any, name: str) -> list[Any]:
    return [layer.delta(name) for layer in nora_layers(pipe.unet, name).values()]


def dense_score(one: list[Tensor], two: list[Tensor]) -> float:
    """The definition, computed from dense updates and principal angles."""
    total = weights = 0.0
    for a, b in zip(one, two, strict=True):
        spaces = []
        for dw in (a, b):
            u, s, vt = torch.linalg.svd(dw)
            k = next(k for k in range(1, len(s) + 1) if s[:k].square().sum() >= ENERGY * s.square().sum())
            spaces.append((u[:, :k], vt[:k].T))
        shares = []
        for side in (0, 1):
            cosines = torch.linalg.svdvals(spaces[0][side].T @ spaces[1][side]).clamp(max=1)
            angles = [math.acos(c) for c in cosines.tolist()]
            shares.append(sum(math.cos(t) ** 2 for t in angles) / len(angles))
        weight = float(a.norm() * b.norm())
        total, weights = total + weight * shares[0] * shares[1], weights + weight
    return total / weights


def test_equals_the_definition(pipe: Any) -> None:
    add(pipe, "dog", "cat", r=4)
    dense = {name: [(d.B.double() @ d.A.double()).detach() for d in deltas(pipe, name)] for name in ("dog", "cat")}
    result = overlap(pipe, "dog", "cat")
    assert result.score == pytest.approx(dense_score(dense["dog"], dense["cat"]), abs=1e-6)
    assert set(result.layers) == {("unet", path) for path in nora_layers(pipe.unet, "dog")}
    assert overlap(pipe, "cat", "dog").score == pytest.approx(result.score)


def test_an_adapter_overlaps_itself_fully_at_any_scale(pipe: Any) -> None:
    add(pipe, "dog", "cat")
    for dog, cat in zip(deltas(pipe, "dog"), deltas(pipe, "cat"), strict=True):
        turn = torch.linalg.qr(torch.randn(2, 2))[0]  # the same product up to scale, with other factors
        cat.A.data, cat.B.data = turn @ dog.A.data, -3 * dog.B.data @ turn.T
    assert overlap(pipe, "dog", "cat").score == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("side", ["A", "B"])
def test_orthogonal_inputs_or_outputs_score_zero(pipe: Any, side: str) -> None:
    """Different inputs or different outputs are enough to avoid interference."""
    add(pipe, "dog", "cat")
    for dog, cat in zip(deltas(pipe, "dog"), deltas(pipe, "cat"), strict=True):
        cat.A.data, cat.B.data = dog.A.data.clone(), dog.B.data.clone()
        half = dog.A.shape[1] // 2 if side == "A" else dog.B.shape[0] // 2
        if side == "A":
            dog.A.data[:, half:], cat.A.data[:, :half] = 0, 0
        else:
            dog.B.data[half:], cat.B.data[:half] = 0, 0
    assert overlap(pipe, "dog", "cat").score == pytest.approx(0, abs=1e-12)


def test_layers_are_weighted_by_both_norms(pipe: Any) -> None:
    """A layer that one adapter does not change, or does not have, does not count."""
    add(pipe, "dog", "cat")
    dogs, cats = deltas(pipe, "dog"), deltas(pipe, "cat")
    for cat in cats[1:]:
        cat.B.data.zero_()
    cats[0].A.data, cats[0].B.data = dogs[0].A.data.clone(), dogs[0].B.data.clone()
    assert overlap(pipe, "dog", "cat").score == pytest.approx(1)
    cats[0].B.data.zero_()
    assert overlap(pipe, "dog", "cat").score == 0.0
    add_adapter(pipe, lora(r=2, target_modules=["to_v"]), "bird")
    randomize(pipe, "bird", 5, size=1.0)
    assert overlap(pipe, "dog", "bird").score == 0.0 and overlap(pipe, "dog", "bird").layers == {}


def test_files_score_like_loaded_adapters(pipe: Any, tmp_path: Path) -> None:
    for seed, name in enumerate(("dog", "cat")):
        add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), name)
        randomize(pipe, name, seed, size=1.0)
        save_adapter(pipe, tmp_path / name, name)
    found = overlap_files(tmp_path / "dog", tmp_path / "cat")
    assert found.score == pytest.approx(overlap(pipe, "dog", "cat").score, abs=1e-9)


def test_mix_warns_only_about_high_overlaps(pipe: Any) -> None:
    add(pipe, "dog", "twin", "cat")
    for dog, twin, cat in zip(*(deltas(pipe, n) for n in ("dog", "twin", "cat")), strict=True):
        twin.A.data, twin.B.data = dog.A.data.clone(), dog.B.data.clone()
        cat.A.data[:, 4:], dog.A.data[:, :4], twin.A.data[:, :4] = 0, 0, 0
    with pytest.warns(UserWarning, match=rf"dog and twin overlap by 1.00 \(above {WARN_ABOVE}\)"):
        report = mix(pipe, {"dog": 0.5, "twin": 0.5}, adapter_name="both")
    assert report.overlaps == {("dog", "twin"): pytest.approx(1)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mix(pipe, {"dog": 0.5, "cat": 0.5}, adapter_name="calm")


def test_adapters_without_an_update_are_refused(pipe: Any) -> None:
    add(pipe, "dog")
    add_adapter(pipe, mor(r=2, num_experts=2), "routed")
    with pytest.raises(UserError, match="'routed' is a routed adapter"):
        overlap(pipe, "dog", "routed")
    with pytest.raises(UserError, match="no adapter named 'ghost'"):
        overlap(pipe, "dog", "ghost")
