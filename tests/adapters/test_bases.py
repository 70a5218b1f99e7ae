"""The randomized SVD of large weights against the exact one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nora_diffusion import UserError
from nora_diffusion.adapters.deltas import bases
from nora_diffusion.adapters.deltas.bases import EXACT_LIMIT, awsvd, svd, truncated_svd

Spectrum = Callable[[Tensor], Tensor]
SPECTRA: dict[str, Spectrum] = {
    "slow": lambda i: (i + 1) ** -0.5,
    "power": lambda i: 1 / (i + 1),
    "geometric": lambda i: 0.97**i,
}
SHAPES = {"square": (640, 640), "wide": (540, 1400), "tall": (1200, 560)}
R = 32


def with_spectrum(d_out: int, d_in: int, spectrum: Spectrum) -> Tensor:
    generator = torch.Generator().manual_seed(d_out + d_in)
    k = min(d_out, d_in)
    u = torch.linalg.qr(torch.randn(d_out, k, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(d_in, k, generator=generator)).Q
    return u * spectrum(torch.arange(k, dtype=torch.float32)) @ v.T


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_error_is_close_to_the_optimum(shape: tuple[int, int], spectrum: Spectrum) -> None:
    """``W`` is built from known singular values, whose tail is exactly the best rank-r error."""
    assert min(shape) > EXACT_LIMIT  # else the SVD would be exact
    weight = with_spectrum(*shape, spectrum)
    exact = spectrum(torch.arange(min(shape), dtype=torch.float64))
    u, s, vt = truncated_svd(weight, R)
    assert float(s.double().square().sum() / exact[:R].square().sum()) > 0.999
    error = torch.linalg.matrix_norm((weight - (u * s) @ vt).double())
    assert float(error / exact[R:].norm()) < 1.001
    torch.testing.assert_close(u.T @ u, torch.eye(R), atol=1e-4, rtol=0)
    torch.testing.assert_close(vt @ vt.T, torch.eye(R), atol=1e-4, rtol=0)
    assert torch.equal(s, s.sort(descending=True).values)


def test_weighted_error_with_a_dead_input_channel() -> None:
    """``||(W - B A) diag(s)||`` is close to its minimum, and the factors are finite."""
    weight = with_spectrum(640, 560, SPECTRA["power"])
    strength = torch.linspace(0.05, 5.0, 560)
    strength[7] = 0.0
    clamped = strength.clamp(min=1e-3 * float(strength.mean()))
    for power in (0.5, 1.0):
        scale = clamped**power
        down, up = awsvd(weight, R, strength, placement="sqrt", power=power)
        assert torch.isfinite(down).all() and torch.isfinite(up).all()
        best = torch.linalg.svdvals((weight * scale).double())[R:].norm()
        error = torch.linalg.matrix_norm(((weight - up @ down) * scale).double())
        assert float(error / best) < 1.001
        plain_down, plain_up = svd(weight, R, None, placement="sqrt", power=power)
        assert error < torch.linalg.matrix_norm(((weight - plain_up @ plain_down) * scale).double())


def test_basis_does_not_depend_on_or_change_the_random_state() -> None:
    weight = with_spectrum(640, 560, SPECTRA["slow"])
    torch.manual_seed(1)
    first = truncated_svd(weight, R)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, truncated_svd(weight, R), strict=True))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    largest = first[2].gather(1, first[2].abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_large_ranks_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = with_spectrum(600, 540, SPECTRA["slow"])
    monkeypatch.setattr(bases, "randomized_svd", lambda *_: pytest.fail("approximated instead of exact"))
    _, s, _ = truncated_svd(weight, 300)
    torch.testing.assert_close(s, SPECTRA["slow"](torch.arange(300.0)), rtol=1e-3, atol=1e-5)


def test_weight_of_lower_rank_than_requested() -> None:
    torch.manual_seed(0)
    weight = torch.randn(700, 5) @ torch.randn(5, 600) / 50
    u, s, vt = truncated_svd(weight, R)
    torch.testing.assert_close((u * s) @ vt, weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(u.T @ u, torch.eye(R), atol=1e-4, rtol=0)
    assert (s[5:] < 1e-5 * s[0]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(dtype: torch.dtype) -> None:
    weight = with_spectrum(560, 540, SPECTRA["power"]).to(dtype)
    _, s, _ = truncated_svd(weight, R)
    assert s.dtype == torch.float32
    torch.testing.assert_close(s, torch.linalg.svdvals(weight.float())[:R], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(value: float) -> None:
    weight = torch.randn(8, 8)
    weight[2, 3] = value
    with pytest.raises(UserError, match="NaN or infinity"):
        truncated_svd(weight, 2)
