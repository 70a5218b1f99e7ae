"""LoRA-Pro against dense least squares, and Adam by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nora_diffusion.optimizers import LoRAPro, Pair
from nora_diffusion.optimizers.lora_pro import corrected

SHAPES = [(4, 12, 9), (1, 5, 7), (6, 6, 6), (3, 20, 3)]
"""``r``, ``d_in``, ``d_out``."""


def problem(r: int, d_in: int, d_out: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """``A``, ``B`` and a full gradient, in fp64."""
    source = torch.Generator().manual_seed(seed)
    kind: dict[str, Any] = {"generator": source, "dtype": torch.float64}
    return torch.randn(r, d_in, **kind), torch.randn(d_out, r, **kind), torch.randn(d_out, d_in, **kind)


def dense_nearest(down: Tensor, up: Tensor, full: Tensor, s: float, ridge: float) -> tuple[Tensor, Tensor]:
    """``(Z, Y)`` by dense least squares over all their entries: ``vec(s (Y A + B Z)) = J [vec Y; vec Z]``."""
    (r, d_in), d_out = down.shape, up.shape[0]
    one_out, one_in = torch.eye(d_out, dtype=down.dtype), torch.eye(d_in, dtype=down.dtype)
    jacobian = s * torch.cat([torch.kron(one_out, down).T, torch.kron(up, one_in)], dim=1)
    size = jacobian.shape[1]
    rows = torch.cat([jacobian, s * ridge**0.5 * torch.eye(size, dtype=down.dtype)])
    wanted = torch.cat([full.flatten(), full.new_zeros(size)])
    found = torch.linalg.lstsq(rows, wanted[:, None], driver="gelsd", rcond=1e-12).solution[:, 0]
    return found[d_out * r :].view(r, d_in), found[: d_out * r].view(d_out, r)


def corrected_one(down: Tensor, up: Tensor, full: Tensor, s: float, damping: float) -> tuple[Tensor, Tensor]:
    z, y = corrected(down[None], up[None], (s * up.T @ full)[None], (s * full @ down.T)[None], s, damping)
    return z[0], y[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_the_correction_is_the_nearest_change_of_the_product(shape: tuple[int, int, int], damping: float) -> None:
    """Without a ridge also the solution of least norm, which is the paper's choice of ``X``."""
    (down, up, full), s = problem(*shape), 0.7
    ridge = damping * float((up**2).sum() + (down**2).sum()) / (2 * shape[0])
    got = corrected_one(down, up, full, s, damping)
    for mine, expected in zip(got, dense_nearest(down, up, full, s, ridge), strict=True):
        assert torch.allclose(mine, expected, atol=1e-9)


def test_without_a_ridge_it_is_the_closed_form_of_the_paper() -> None:
    (down, up, full), s = problem(4, 12, 9), 1.5
    g_down, g_up = s * up.T @ full, s * full @ down.T
    p, q = up.T @ up, down @ down.T
    right = -torch.linalg.solve(p, g_down @ down.T) / s**2
    one = torch.eye(4, dtype=p.dtype)
    x = torch.linalg.solve(torch.kron(p, one) + torch.kron(one, q), right.flatten()).view(4, 4)
    z = torch.linalg.solve(p, g_down) / s**2 + x @ down
    y = (g_up - up @ torch.linalg.solve(p, up.T @ g_up)) @ torch.linalg.inv(q) / s**2 - up @ x
    got = corrected_one(down, up, full, s, 0.0)
    assert torch.allclose(got[0], z) and torch.allclose(got[1], y)


def test_the_first_step_moves_the_up_factor_only() -> None:
    """At ``B = 0`` the change of ``dW`` is the full gradient projected onto the rows of ``A``."""
    down, up, full = problem(4, 12, 9)
    z, y = corrected_one(down, 0 * up, full, 0.5, 1e-9)
    assert not z.any()
    assert torch.allclose(0.5 * y @ down, full @ torch.linalg.pinv(down) @ down, atol=1e-6)


def test_singular_factors_stay_finite() -> None:
    down, up, full = problem(4, 12, 9)
    down[3], up[:, 2] = down[0], 0
    for pair in ((down, up), (0 * down, up), (0 * down, 0 * up)):
        found = corrected_one(*pair, full, 1.0, 1e-2)
        assert all(value.isfinite().all() for value in found)
        single = corrected_one(*(factor.float() for factor in pair), full.float(), 1.0, 1e-2)
        assert all(torch.allclose(a.float(), b, atol=1e-3) for a, b in zip(found, single, strict=True))


@pytest.mark.parametrize("moments", ["factors", "full"])
def test_steps_equal_adam_of_the_corrected_gradients(moments: Any) -> None:
    """Adam written out; of the factors' changes, or of the full matrix, whose result is corrected again."""
    down, up, _ = problem(3, 8, 6)
    target, s, lr, decay, damping = problem(3, 8, 6, seed=1)[2], 0.6, 0.03, 0.1, 1e-3
    pair = Pair(nn.Parameter(down.clone()), nn.Parameter(up.clone()), s)
    optimizer = LoRAPro([pair], lr=lr, weight_decay=decay, damping=damping, moments=moments, lr_ratio=2.0)
    mean: dict[str, Any] = {"z": 0, "y": 0, "w": 0}
    square = dict(mean)

    def adam(key: str, gradient: Tensor, step: int) -> Tensor:
        mean[key] = 0.9 * mean[key] + 0.1 * gradient
        square[key] = 0.999 * square[key] + 0.001 * gradient**2
        return (mean[key] / (1 - 0.9**step)) / ((square[key] / (1 - 0.999**step)).sqrt() + 1e-8)

    for step in range(1, 5):
        optimizer.zero_grad()
        ((s * pair.B @ pair.A - target) ** 2).sum().mul(0.5).backward()
        optimizer.step()
        ridge = damping * float((up**2).sum() + (down**2).sum()) / 6
        z, y = dense_nearest(down, up, s * up @ down - target, s, ridge)
        if moments == "full":
            z, y = dense_nearest(down, up, adam("w", s * (y @ down + up @ z), step), s, ridge)
        else:
            z, y = adam("z", z, step), adam("y", y, step)
        down, up = down * (1 - lr * decay) - lr * z, up * (1 - 2 * lr * decay) - 2 * lr * y
        assert torch.allclose(pair.A, down, atol=1e-7) and torch.allclose(pair.B, up, atol=1e-7)
