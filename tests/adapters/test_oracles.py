"""Layers and bases against their formulas, computed densely in fp64."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nora_diffusion.adapters import lora, lora_xs, mor, nora
from nora_diffusion.adapters.axes import Placement
from nora_diffusion.adapters.config import AdapterConfig, Start
from nora_diffusion.adapters.deltas.bases import awsvd, orthogonal, svd, truncated_svd
from nora_diffusion.adapters.tuner.layer import NoraLayer

D_OUT, D_IN = 10, 12


def decaying(d_out: int, d_in: int, rate: float = 0.6) -> torch.Tensor:
    """A matrix whose singular values decay like those of trained weights."""
    k = min(d_out, d_in)
    u, _ = torch.linalg.qr(torch.randn(d_out, k))
    v, _ = torch.linalg.qr(torch.randn(d_in, k))
    return u @ torch.diag(rate ** torch.arange(k)) @ v.T


def layer_with(config: AdapterConfig, base: nn.Module) -> NoraLayer:
    layer = NoraLayer(base.double())
    config.start = Start({"m": torch.rand(base.weight.shape[1]) + 0.1})  # type: ignore[index, union-attr, operator]
    layer.update_layer("x", config, "m")
    layer.double()
    for parameter in layer.delta("x").parameters():
        parameter.data.normal_()
    return layer


def test_nora_is_the_serial_chain() -> None:
    layer = layer_with(nora(r=6, inner_r=2, alpha=3.0), nn.Linear(D_IN, D_OUT))
    x = torch.randn(5, D_IN, dtype=torch.float64)
    d = layer.delta("x")
    expected = layer.base_layer(x) + (3.0 / 6) * x @ d.A_out.T @ d.core.A_in.T @ d.core.B_in.T @ d.B_out.T
    torch.testing.assert_close(layer(x), expected)
    assert sum(p.numel() for p in d.parameters()) == 2 * 6 * 2


def test_lora_and_lora_xs() -> None:
    x = torch.randn(5, D_IN, dtype=torch.float64)
    layer = layer_with(lora(r=3, alpha=6.0), nn.Linear(D_IN, D_OUT))
    d = layer.delta("x")
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 2.0 * x @ d.A.T @ d.B.T)
    layer = layer_with(lora_xs(r=4), nn.Linear(D_IN, D_OUT))
    d = layer.delta("x")
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ d.A_out.T @ d.core.R.T @ d.B_out.T)


def test_mor_is_a_gated_sum_of_scaled_experts() -> None:
    layer = layer_with(mor(r=4, num_experts=3, alpha=8.0), nn.Linear(D_IN, D_OUT))
    d = layer.delta("x")
    x = torch.randn(5, D_IN, dtype=torch.float64)
    expected = layer.base_layer(x)
    for token in range(5):
        gates = torch.softmax((d.W_g @ x[token]).float(), 0).double()
        for i in range(3):
            e = d.experts
            expert = torch.diag(e.b[i]) @ e.B @ torch.diag(e.a[i]) @ e.A
            expected[token] = expected[token] + (8.0 / 4) * gates[i] * expert @ x[token]
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-6)  # gates are computed in fp32


@pytest.mark.parametrize("config", [nora(r=6, inner_r=2), lora(r=3), lora_xs(r=4)], ids=lambda c: c.method)
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 1)])
def test_convolutions_equal_the_dense_kernel(config: AdapterConfig, kernel: int, stride: int, padding: int) -> None:
    layer = layer_with(config, nn.Conv2d(5, 8, kernel, stride=stride, padding=padding))
    x = torch.randn(2, 5, 7, 7, dtype=torch.float64)
    base = layer.base_layer
    dense = base.weight + layer.get_delta_weight("x").double()
    expected = F.conv2d(x, dense, base.bias, stride=stride, padding=padding)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)  # dW is computed in fp32


def test_truncated_svd_finds_the_best_rank_r_part() -> None:
    torch.manual_seed(0)
    weight = decaying(40, 30)
    u, s, vt = truncated_svd(weight, 5)
    exact = torch.linalg.svdvals(weight)
    torch.testing.assert_close(s, exact[:5])
    assert torch.linalg.matrix_norm(weight - (u * s) @ vt) == pytest.approx(float(exact[5:].norm()), rel=1e-4)


def test_randomized_svd_agrees_with_the_full_one() -> None:
    torch.manual_seed(0)
    weight = decaying(700, 520, rate=0.9)
    u, s, vt = truncated_svd(weight, 16)
    torch.testing.assert_close(s, torch.linalg.svdvals(weight)[:16], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(u.T @ u, torch.eye(16), atol=1e-4, rtol=0)
    again = truncated_svd(weight, 16)
    assert torch.equal(vt, again[2])


@pytest.mark.parametrize("placement", get_args(Placement))
def test_placements_span_the_same_space(placement: str) -> None:
    weight = decaying(20, 16)
    down, up = svd(weight, 4, None, placement=placement, power=1.0)  # type: ignore[arg-type]
    u, s, vt = truncated_svd(weight, 4)
    powers = {"up": s, "down": s, "sqrt": s, "none": torch.ones_like(s)}
    torch.testing.assert_close(up @ down, (u * powers[placement]) @ vt, atol=1e-5, rtol=1e-4)


def test_awsvd_minimizes_the_activation_weighted_error() -> None:
    """``||(W - B A) diag(s)||`` equals the tail of the singular values of ``W diag(s)``, and beats plain SVD."""
    torch.manual_seed(0)
    weight, strength = decaying(24, 20, rate=0.9), torch.rand(20) * 5 + 0.05
    down, up = awsvd(weight, 6, strength, placement="up", power=1.0)
    tail = torch.linalg.svdvals(weight * strength)[6:].norm()
    error = torch.linalg.matrix_norm((weight - up @ down) * strength)
    assert float(error) == pytest.approx(float(tail), rel=1e-4)
    plain_down, plain_up = svd(weight, 6, strength, placement="up", power=1.0)
    assert error < torch.linalg.matrix_norm((weight - plain_up @ plain_down) * strength)


def test_orthogonal_basis_is_orthonormal() -> None:
    down, up = orthogonal(torch.randn(12, 10), 4, None, placement="sqrt", power=1.0)
    torch.testing.assert_close(down @ down.T, torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(up.T @ up, torch.eye(4), atol=1e-5, rtol=0)


def test_awsvd_survives_a_dead_channel() -> None:
    weight, strength = decaying(12, 10), torch.rand(10)
    strength[3] = 0
    down, up = awsvd(weight, 4, strength, placement="sqrt", power=1.0)
    assert torch.isfinite(down).all() and torch.isfinite(up).all()
    assert down.abs().max() < 1e5


def test_published_serial_structure() -> None:
    """As in the published code: AwSVD with power 1, singular values in the up factor, the inner pair in between.

    ``s = mean |x|`` of each input channel (a dead one clamped away from zero), ``W diag(s) = U S V^T``, the top ``r``:
    ``A_out = V^T diag(1/s)``, ``B_out = U S``; ``y = W x + (alpha/r) B_out (B_in (A_in (A_out x)))``.
    """
    torch.manual_seed(0)
    weight = decaying(D_OUT, D_IN)
    strength = torch.rand(D_IN) + 0.1
    strength[7] = 0
    alive = strength.clamp(min=1e-3 * float(strength.mean()))
    base = nn.Linear(D_IN, D_OUT, bias=False)
    base.weight.data.copy_(weight)
    config = nora(r=5, inner_r=3, alpha=10.0, placement="up", power=1.0, basis_dtype="float32")
    config.start = Start({"m": strength})
    layer = NoraLayer(base)
    layer.update_layer("x", config, "m")
    layer.delta("x").core.B_in.data.normal_()
    u, s, vt = torch.linalg.svd(weight @ torch.diag(alive), full_matrices=False)
    outer_down, outer_up = vt[:5] @ torch.diag(1 / alive), u[:, :5] @ torch.diag(s[:5])
    # Singular vectors are unique up to their signs, so compare the product of the outer pair.
    d = layer.delta("x")
    torch.testing.assert_close(d.B_out @ d.A_out, outer_up @ outer_down, atol=1e-5, rtol=1e-4)
    sign = torch.sign((d.A_out * outer_down).sum(1))
    x = torch.randn(4, D_IN)
    p = (x @ outer_down.T) * sign
    expected = x @ weight.T + (10.0 / 5) * ((p @ d.core.A_in.T) @ d.core.B_in.T * sign) @ outer_up.T
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
