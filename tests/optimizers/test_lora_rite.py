"""LoRA-RITE: its invariance, and its steps by the formulas of the paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nora_diffusion.optimizers import LoRARite, Pair


def start(r: int, d_in: int, d_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """``A``, ``B`` and the target of ``dW``, in fp64."""
    source = torch.Generator().manual_seed(0)
    kind: dict[str, Any] = {"generator": source, "dtype": torch.float64}
    return torch.randn(r, d_in, **kind), torch.randn(d_out, r, **kind), torch.randn(d_out, d_in, **kind)


def updates(down: Tensor, up: Tensor, target: Tensor, s: float = 0.7, **options: Any) -> list[Tensor]:
    """``dW`` after each of some steps towards the target."""
    pair = Pair(nn.Parameter(down.clone()), nn.Parameter(up.clone()), s)
    optimizer = LoRARite([pair], **{"lr": 0.05, "eps": 1e-30, **options})
    found = []
    for _ in range(12):
        optimizer.zero_grad()
        ((s * pair.B @ pair.A - target) ** 2).sum().backward()
        optimizer.step()
        found.append((s * pair.B @ pair.A).detach())
    return found


@pytest.mark.parametrize("shape", [(4, 12, 9), (1, 5, 7), (5, 5, 6)], ids=str)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3}, {"lr_ratio": 4.0}], ids=str)
def test_training_does_not_depend_on_how_the_update_is_split(
    shape: tuple[int, int, int], options: dict[str, float]
) -> None:
    down, up, target = start(*shape)
    change = torch.randn(shape[0], shape[0], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    change = change + 3 * torch.eye(shape[0], dtype=torch.float64)
    one = updates(down, up, target, **options)
    other = updates(torch.linalg.solve(change, down), up @ change, target, **options)
    assert (one[-1] - one[0]).norm() > 0.1 * one[0].norm()
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(one, other, strict=True))


def test_steps_equal_the_formulas_with_qr() -> None:
    """The paper's algorithm for tall factors, with the bases of a QR decomposition."""
    down, up, target = start(3, 8, 6)
    s, lr, decay, b1, b2 = 0.7, 0.05, 0.1, 0.9, 0.999
    expected = []
    tall = {"B": up.clone(), "A": down.T.clone()}
    state: dict[str, Any] = {name: {"U": None, "V": 0.0, "e": 0.0, "M": 0.0} for name in tall}
    for step in range(1, 13):
        r1, r2 = (b * (1 - b ** (step - 1)) / (1 - b**step) for b in (b1, b2))
        full = 2 * (s * tall["B"] @ tall["A"].T - target)
        gradients = {"B": s * full @ tall["A"], "A": s * full.T @ tall["B"]}
        bases = {name: torch.linalg.qr(factor) for name, factor in tall.items()}
        moved = {}
        for name, other in (("B", "A"), ("A", "B")):
            (u, r), own = bases[other], state[name]
            g = gradients[name] @ torch.linalg.inv(r)
            if own["U"] is None:
                own["V"], carried, own["M"] = torch.zeros(3, 3, dtype=u.dtype), torch.zeros(3, 3, dtype=u.dtype), 0 * g
            else:
                t = u.T @ own["U"]
                carried, own["M"] = t @ own["V"] @ t.T, own["M"] @ t.T
            escaped = (torch.linalg.eigvalsh(own["V"]) - torch.linalg.eigvalsh(carried)).abs().max()
            own["e"] = r2 * (own["e"] + escaped)
            own["V"] = r2 * carried + (1 - r2) * g.T @ g / len(g)
            values, vectors = torch.linalg.eigh(own["V"] + own["e"] * torch.eye(3, dtype=u.dtype))
            own["M"] = r1 * own["M"] + (1 - r1) * g @ vectors @ torch.diag(values**-0.5) @ vectors.T
            own["U"] = u
            moved[name] = tall[name] * (1 - lr * decay) - lr * own["M"] @ torch.linalg.inv(r).T
        tall = moved
        expected.append(s * tall["B"] @ tall["A"].T)
    got = updates(down, up, target, s, lr=lr, weight_decay=decay)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(got, expected, strict=True))


def test_the_first_step_moves_the_up_factor_only() -> None:
    """From ``B = 0``; its columns become orthogonal after the change of basis, and the second step moves ``A`` too."""
    down, up, target = start(4, 12, 9)
    pair = Pair(nn.Parameter(down.clone()), nn.Parameter(0 * up))
    optimizer = LoRARite([pair], lr=0.1, weight_decay=0.0)
    for step in range(2):
        optimizer.zero_grad()
        ((pair.B @ pair.A - target) ** 2).sum().backward()
        optimizer.step()
        assert torch.equal(pair.A, down) == (step == 0)
        if step == 0:
            singular = torch.linalg.svdvals(pair.B.detach() @ down)[:4]
            assert torch.allclose(singular, torch.full_like(singular, 0.1 * 9**0.5))


def test_directions_without_a_gradient_do_not_become_steps() -> None:
    """A gradient of rank 1 in fp32: rounding errors in the other directions are not scaled up to full steps."""
    down, up, _ = (value.float() for value in start(4, 12, 9))
    full = torch.outer(torch.ones(9), torch.arange(12.0))
    pair = Pair(nn.Parameter(down.clone()), nn.Parameter(up.clone()))
    optimizer = LoRARite([pair], lr=0.1, weight_decay=0.0)
    pair.A.grad, pair.B.grad = up.T @ full, full @ down.T
    optimizer.step()
    singular = torch.linalg.svdvals((pair.B.detach() - up) @ down)
    assert singular[0] > 0.1 and singular[1] < 1e-2 * singular[0]


def test_rank_deficient_factors_move_where_they_have_mass() -> None:
    down, up, target = (value.float() for value in start(4, 12, 9))
    down[3] = 0
    up[:, 3] = 0
    pair = Pair(nn.Parameter(down), nn.Parameter(up))
    optimizer = LoRARite([pair], lr=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = ((pair.B @ pair.A - target) ** 2).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and not pair.A[3].any() and not pair.B[:, 3].any()
