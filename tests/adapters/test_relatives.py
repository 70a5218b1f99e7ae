"""The methods related to NoRA against their formulas, computed densely in fp64: one oracle per method."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nora_diffusion.adapters import (
    AdapterConfig,
    NoraLayer,
    dora,
    dylora,
    lora,
    lora_mini,
    melora,
    mora,
    nora,
    nora_input,
)
from nora_diffusion.adapters.config import Start
from nora_diffusion.adapters.tuner.rank_mask import sample_ranks, watch
from nora_diffusion.errors import UserError

D_OUT, D_IN = 10, 12
EXACT = {"atol": 1e-12, "rtol": 1e-9}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def add(layer: NoraLayer, config: AdapterConfig, name: str = "x") -> Any:
    """Add an adapter with random trained factors to a layer, in fp64; returns its delta."""
    weight = layer.base_layer.weight
    config.start = Start({"m": torch.rand(weight.shape[1]) + 0.1})  # type: ignore[index, union-attr, operator]
    layer.update_layer(name, config, "m")
    layer.double()
    for parameter in layer.delta(name).parameters():
        parameter.data.normal_()
    return layer.delta(name)


def layer_with(config: AdapterConfig, base: nn.Module | None = None) -> tuple[NoraLayer, Any, torch.Tensor]:
    layer = NoraLayer((base or nn.Linear(D_IN, D_OUT)).double())
    return layer, add(layer, config), torch.randn(5, D_IN, dtype=torch.float64)


def decomposed(weight: torch.Tensor, dw: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """``m * (W + dW) / ||W + dW||`` row by row, as in the DoRA paper."""
    rows = []
    for w, d, m in zip(weight.flatten(1), dw.flatten(1), magnitude, strict=True):
        rows.append(m * (w + d) / math.sqrt(sum(float(v) ** 2 for v in (w + d).detach())))
    return torch.stack(rows).view(weight.shape)


def test_lora_mini_trains_the_inner_two_of_four_factors() -> None:
    layer, d, x = layer_with(lora_mini(r=6, inner_r=2, alpha=3.0))
    expected = layer.base_layer(x) + (3.0 / 6) * x @ d.A_out.T @ d.core.A_in.T @ d.core.B_in.T @ d.B_out.T
    torch.testing.assert_close(layer(x), expected, **EXACT)
    assert {name for name, _ in d.named_parameters()} == {"core.A_in", "core.B_in"}
    weight = layer.base_layer.weight.clone()
    assert torch.linalg.matrix_rank(torch.cat([d.A_out, weight])) == D_IN  # the basis is random


def test_one_sided_nora_trains_the_output_side() -> None:
    layer, d, x = layer_with(nora_input(r=6, inner_r=2, alpha=3.0))
    expected = layer.base_layer(x) + (3.0 / 6) * x @ d.A_out.T @ d.core.A_in.T @ d.B.T
    torch.testing.assert_close(layer(x), expected, **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, **EXACT)
    assert {name: tuple(p.shape) for name, p in d.named_parameters()} == {"B": (D_OUT, 2), "core.A_in": (2, 6)}
    assert [name for name, _ in d.named_buffers()] == ["A_out"]


@pytest.mark.parametrize("user_weight", [1.0, 0.3, -2.0])
def test_dora_scales_each_row_of_the_adapted_weight(user_weight: float) -> None:
    layer, d, x = layer_with(dora(r=3, alpha=6.0))
    layer.set_scale("x", user_weight)
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    target = decomposed(weight, (6.0 / 3) * d.B @ d.A, d.m)
    dense = weight + user_weight * (target - weight)
    torch.testing.assert_close(layer(x), x @ dense.T + bias, **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ dense.T + bias, **EXACT)


def test_dora_holds_the_norm_constant_in_backward() -> None:
    layer, d, x = layer_with(dora(r=3, alpha=6.0))
    layer(x).square().sum().backward()
    a, b, m = (p.detach().clone().requires_grad_() for p in (d.A, d.B, d.m))
    weight, bias = layer.base_layer.weight.detach(), layer.base_layer.bias.detach()
    adapted = weight + 2.0 * b @ a
    dense = m.unsqueeze(1) * adapted / adapted.detach().norm(dim=1, keepdim=True)
    (x @ dense.T + bias).square().sum().backward()
    for ours, oracle in ((d.A, a), (d.B, b), (d.m, m)):
        torch.testing.assert_close(ours.grad, oracle.grad, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize(
    "config",
    [dora(r=3), nora(r=6, inner_r=2, magnitude=True), melora(r=4, blocks=2, magnitude=True)],
    ids=lambda c: c.method,
)
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 2)])
def test_magnitude_of_a_convolution(config: AdapterConfig, kernel: int, stride: int) -> None:
    layer, d, _ = layer_with(config, nn.Conv2d(4, 6, kernel, stride=stride, padding=kernel // 2))
    base, x = layer.base_layer, torch.randn(2, 4, 7, 7, dtype=torch.float64)
    down, up = d.pair()
    dense = decomposed(base.weight, (up @ down).view(base.weight.shape), d.m)
    expected = F.conv2d(x, dense, base.bias, stride=stride, padding=kernel // 2)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-6)  # a basis is rounded to fp16, then upcast


def test_dora_beside_others_is_a_sum_live_and_merged() -> None:
    """Each adapter changes the weight as if it were alone, whichever others are live or merged."""
    layer, d, x = layer_with(dora(r=3))
    e, plain = add(layer, dora(r=2, alpha=4.0), "e"), add(layer, lora(r=2), "plain")
    layer.set_scale("e", 0.5)
    weight, bias = layer.base_layer.weight.detach().clone(), layer.base_layer.bias
    dense = decomposed(weight, d.B @ d.A, d.m) + 0.5 * (decomposed(weight, 2.0 * e.B @ e.A, e.m) - weight)
    expected = x @ (dense + plain.B @ plain.A).T + bias
    torch.testing.assert_close(layer(x), expected, **EXACT)
    for merged in (["plain"], ["plain", "x"], ["x", "e", "plain"]):
        layer.merge(adapter_names=merged)
        torch.testing.assert_close(layer(x), expected, atol=2e-5, rtol=1e-5)  # dW is computed in fp32
        layer.unmerge()
        assert torch.equal(layer.base_layer.weight, weight)


@pytest.mark.parametrize("config", [dora(r=2), nora(r=4, inner_r=2, magnitude=True)], ids=lambda c: c.method)
def test_row_norms_are_exact_under_autocast(config: AdapterConfig) -> None:
    layer, _, _ = layer_with(config)
    exact = layer.float().row_factors("x")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.row_factors("x"), exact)


def test_dora_starts_as_a_no_op_and_survives_a_row_of_zeros() -> None:
    base = nn.Linear(D_IN, D_OUT)
    base.weight.data[3] = 0
    layer, x = NoraLayer(base), torch.randn(5, D_IN)
    layer.update_layer("x", dora(r=3), "m")
    torch.testing.assert_close(layer(x), base(x), atol=1e-6, rtol=0)
    layer(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.delta("x").parameters())


def test_mora_is_a_square_matrix_between_shared_groups() -> None:
    layer, d, x = layer_with(mora(r=2, alpha=4.0))
    k = round(math.sqrt((D_IN + D_OUT) * 2))
    assert [p.shape for p in d.parameters()] == [(k, k)] and k == 7
    compressed = torch.stack([sum(x[:, i] for i in range(D_IN) if i % k == g) for g in range(k)], 1)  # type: ignore[misc]
    square = compressed @ d.core.R.T
    decompressed = torch.stack([square[:, i % k] for i in range(D_OUT)], 1)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + (4.0 / 2) * decompressed, **EXACT)
    assert torch.linalg.matrix_rank(layer.get_delta_weight("x")) == k
    assert set(d.state_dict()) == {"core.R"}


def test_melora_is_block_diagonal() -> None:
    layer, d, x = layer_with(melora(r=4, blocks=2, alpha=8.0))
    expected = layer.base_layer(x)
    for i in range(2):
        columns, rows = slice(6 * i, 6 * i + 6), slice(5 * i, 5 * i + 5)
        block = d.B[5 * i : 5 * i + 5] @ d.A[2 * i : 2 * i + 2]
        expected[:, rows] += (8.0 / 4) * x[:, columns] @ block.T
    torch.testing.assert_close(layer(x), expected, **EXACT)
    assert sum(p.numel() for p in d.parameters()) == 4 // 2 * (D_IN + D_OUT)
    assert torch.linalg.matrix_rank(layer.get_delta_weight("x")) == 4


def test_blocks_must_divide_the_projection() -> None:
    with pytest.raises(UserError, match="blocks=4 does not divide 'm', which is 10 x 12"):
        NoraLayer(nn.Linear(D_IN, D_OUT)).update_layer("x", melora(r=8, blocks=4), "m")


def test_block_diagonal_basis_is_the_basis_of_each_block() -> None:
    layer, d, _ = layer_with(nora(r=4, inner_r=2, blocks=2, basis="svd", basis_dtype="float32"))
    down, up = d.outer
    for i in range(2):
        block = layer.base_layer.weight[5 * i : 5 * i + 5, 6 * i : 6 * i + 6]
        u, s, vt = torch.linalg.svd(block)
        best = (u[:, :2] * s[:2]) @ vt[:2]
        found = (up @ down)[5 * i : 5 * i + 5, 6 * i : 6 * i + 6]
        torch.testing.assert_close(found, best, atol=1e-5, rtol=1e-5)
    assert torch.count_nonzero(up @ down) == 2 * 5 * 6


def test_a_diagonal_core_scales_each_direction() -> None:
    layer, d, x = layer_with(nora(r=4, core="diagonal", alpha=2.0))
    expected = layer.base_layer(x)
    for i in range(4):
        expected = expected + 0.5 * d.core.d[i] * torch.outer(x @ d.A_out[i], d.B_out[:, i])
    torch.testing.assert_close(layer(x), expected, **EXACT)


CUTS = {
    "dylora": (dylora(r=4), lambda d, b: d.B[:, :b] @ d.A[:b]),
    "nested": (
        nora(r=6, inner_r=4, rank_mask=True),
        lambda d, b: d.B_out @ d.core.B_in[:, :b] @ d.core.A_in[:b] @ d.A_out,
    ),
    "diagonal": (
        nora(r=4, core="diagonal", rank_mask=True),
        lambda d, b: d.B_out[:, :b] @ torch.diag(d.core.d[:b]) @ d.A_out[:b],
    ),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_masked_adapter_is_truncated_to_its_first_directions(name: str) -> None:
    config, cut = CUTS[name]
    layer, d, x = layer_with(config)
    layer.eval()
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ cut(d, 4).T, **EXACT)
    for rank in range(1, 5):
        d.rank = rank
        expected = layer.base_layer(x) + x @ cut(d, rank).T
        torch.testing.assert_close(layer(x), expected, **EXACT)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected, **EXACT)


def test_ranks_are_sampled_once_per_step_for_all_layers() -> None:
    config = dylora(r=4)
    model = nn.Sequential(*(NoraLayer(nn.Linear(D_IN, D_IN)) for _ in range(3)))
    for layer in model:
        layer.update_layer("x", config, "m")  # type: ignore[operator]
    watch(model)
    watch(model)
    assert list(model._forward_pre_hooks.values()) == [sample_ranks]

    def drawn(steps: int) -> list[int]:
        torch.manual_seed(3)
        ranks = []
        for _ in range(steps):
            model(torch.randn(2, D_IN))
            per_layer = {layer.delta("x").sampled_rank for layer in model}  # type: ignore[operator]
            assert len(per_layer) == 1
            ranks += per_layer
        return ranks

    assert set(drawn(60)) == {1, 2, 3, 4} and drawn(60) == drawn(60)
    model.eval()
    state = torch.get_rng_state()
    model(torch.zeros(2, D_IN))
    assert torch.equal(torch.get_rng_state(), state)


def test_training_at_a_low_rank_leaves_the_other_directions_unchanged() -> None:
    layer, d, x = layer_with(dylora(r=4))
    layer.train()
    d.sampled_rank = 2
    layer(x).square().sum().backward()
    assert d.A.grad[:2].abs().min() > 0 and d.B.grad[:, :2].abs().min() > 0
    assert not d.A.grad[2:].any() and not d.B.grad[:, 2:].any()


def test_one_training_serves_every_rank() -> None:
    """Every truncation of a DyLoRA reaches the best update of its rank (Eckart, Young); a truncated LoRA does not."""
    spectrum, inputs = torch.tensor([4.0, 2.0, 1.0, 0.5]), torch.eye(D_IN)
    u, v = (torch.linalg.qr(torch.randn(size, 4)).Q for size in (D_OUT, D_IN))
    target = u @ torch.diag(spectrum) @ v.T

    def errors(config: AdapterConfig) -> list[float]:
        torch.manual_seed(1)
        layer = NoraLayer(nn.Linear(D_IN, D_OUT, bias=False))
        layer.update_layer("x", config, "m")
        model = nn.Sequential(layer).train()
        watch(model)
        optimizer = torch.optim.Adam(layer.delta("x").parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
        wanted = layer.base_layer(inputs).detach() + target.T
        for _ in range(300):
            optimizer.zero_grad()
            (model(inputs) - wanted).square().sum().backward()
            optimizer.step()
            schedule.step()
        down, up = layer.delta("x").pair()
        return [float((up[:, :b] @ down[:b] - target).detach().norm()) for b in range(1, 5)]

    best = [float(spectrum[b:].norm()) for b in range(1, 5)]
    assert errors(dylora(r=4)) == pytest.approx(best, abs=0.02)
    plain = errors(lora(r=4))
    assert plain[3] == pytest.approx(0, abs=0.02)
    assert all(cut > 1.2 * optimum for cut, optimum in zip(plain[:3], best[:3], strict=True))


def test_the_hook_is_removed_with_the_last_masked_adapter() -> None:
    model = nn.Sequential(NoraLayer(nn.Linear(D_IN, D_IN)))
    model[0].update_layer("x", dylora(r=4), "m")  # type: ignore[operator]
    watch(model)
    model[0].delete_adapter("x")  # type: ignore[operator]
    model(torch.zeros(1, D_IN))
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("axes", "word"),
    [
        ({"trained": ["core", "sideways"]}, "sideways"),
        ({"trained": ["up"]}, "never learns: 'core'"),
        ({"core": "none", "trained": ["down"]}, "never learns: 'up'"),
        ({"core": "none", "trained": ["up", "core"]}, "never learns"),
        ({"basis": "sharing", "trained": ["core", "up"]}, "is fixed"),
        ({"basis": "sharing", "core": "none"}, "is fixed"),
        ({"core": "none", "router": "token", "magnitude": True}, "does not go with"),
        ({"core": "none", "router": "token", "blocks": 2}, "does not go with"),
        ({"core": "none", "router": "token", "num_experts": 4, "trained": ["up"]}, "a mixture trains"),
        ({"num_experts": 4}, "needs a router"),
        ({"blocks": 0}, "blocks=0"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha_pattern": {"to_q": float("nan")}}, "to_q"),
        ({"rank_pattern": {"to_q": 0}}, "to_q"),
        ({"inner_rank_pattern": {"to_q": 0}}, "to_q"),
        ({"inner_rank_pattern": {"to_q": 1.5}}, "inner_rank_pattern"),
        ({"inner_rank_pattern": {"(a+)+": 2}}, "is not an allowed pattern"),
        ({"core": "dense", "inner_rank_pattern": {"to_q": 2}}, "needs an inner rank, which core='dense'"),
    ],
)
def test_axes_that_conflict_are_refused(axes: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        AdapterConfig(**axes)


def test_patterns_match_with_and_without_the_prefix_of_clip() -> None:
    """The paths of CLIP's layers differ between transformers releases, and so between files."""
    path, other = "encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.q_proj"
    for pattern in (path, f"text_model.{path}"):
        config = lora(r=4, rank_pattern={pattern: 2}, alpha_pattern={pattern: 6.0})
        for key in (path, f"text_model.{path}"):
            assert (config.rank_for(key), config.scale_for(key)) == (2, 3.0)
        assert (config.rank_for(other), config.scale_for(other)) == (4, 1.0)
