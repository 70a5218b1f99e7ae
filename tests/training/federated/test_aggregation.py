"""Aggregation of clients' factors, against dense matrices in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nora_diffusion import UserError
from nora_diffusion.training.federated.aggregation import AGGREGATIONS, RIDGE, exact, fair, squared_errors
from nora_diffusion.training.federated.factors import aggregated, packed, unpacked

WEIGHTS = [0.5, 0.3, 0.2]
KEY = "unet.a.to_q.nora_"


def clients(seed: int = 0, shape: tuple[int, int] = (7, 6), r: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    random = [
        torch.randn(3, *size, generator=generator, dtype=torch.float64) for size in ((r, shape[1]), (shape[0], r))
    ]
    return list(zip(random[0], random[1], strict=True))


def dense(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return sum((weight * up @ down for (down, up), weight in zip(pairs, WEIGHTS, strict=True)), torch.zeros(()))


def test_the_average_is_of_the_factors() -> None:
    pairs = clients()
    down, up = AGGREGATIONS["average"](pairs, WEIGHTS)
    torch.testing.assert_close(down, sum(w * a for (a, _), w in zip(pairs, WEIGHTS, strict=True)))
    torch.testing.assert_close(up, sum(w * b for (_, b), w in zip(pairs, WEIGHTS, strict=True)))


@pytest.mark.parametrize("shape", [(7, 6), (5, 9), (2, 4)])
def test_exact_is_the_nearest_update_of_the_rank(shape: tuple[int, int]) -> None:
    pairs = clients(1, shape)
    down, up = exact(pairs, WEIGHTS)
    u, s, vt = torch.linalg.svd(dense(pairs))
    torch.testing.assert_close(up @ down, u[:, :2] * s[:2] @ vt[:2])
    mean_down = sum(w * a for (a, _), w in zip(pairs, WEIGHTS, strict=True))
    torch.testing.assert_close(down.square().sum(), mean_down.square().sum())  # type: ignore[union-attr]


def test_exact_keeps_ranks_that_have_no_update_yet() -> None:
    pairs = [(down, torch.zeros_like(up)) for down, up in clients()]
    down, up = exact(pairs, WEIGHTS)
    assert not up.any()
    assert torch.linalg.matrix_rank(down) == 2


@pytest.mark.parametrize("shape", [(7, 6), (5, 9)])
def test_fair_is_the_least_squares_correction(shape: tuple[int, int]) -> None:
    """``min ||dW - (B + D) A||^2 + l ||D||^2`` as one dense least-squares problem in the entries of ``D``."""
    pairs = clients(2, shape)
    down, up = fair(pairs, WEIGHTS)
    mean_down, mean_up = AGGREGATIONS["average"](pairs, WEIGHTS)
    ridge = RIDGE * (mean_down @ mean_down.T).trace() / 2
    rows = torch.cat([mean_down.T, ridge.sqrt() * torch.eye(2, dtype=torch.float64)])
    target = torch.cat([(dense(pairs) - mean_up @ mean_down).T, torch.zeros(2, shape[0], dtype=torch.float64)])
    torch.testing.assert_close(up - mean_up, torch.linalg.lstsq(rows, target).solution.T)
    assert torch.equal(down, mean_down)


def test_the_errors_are_those_of_the_dense_updates_and_fair_is_better_than_the_average() -> None:
    pairs, errors = clients(3), {}
    for name, aggregate in AGGREGATIONS.items():
        down, up = aggregate(pairs, WEIGHTS)
        errors[name], norm = squared_errors((down, up), pairs, WEIGHTS)
        assert errors[name] == pytest.approx(float((up @ down - dense(pairs)).square().sum()))
        assert norm == pytest.approx(float(dense(pairs).square().sum()))
    assert errors["exact"] < errors["fair"] < errors["average"]


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_equal_clients_give_their_own_update(name: str) -> None:
    pairs = [clients()[0]] * 3
    down, up = AGGREGATIONS[name](pairs, WEIGHTS)  # type: ignore[index]
    torch.testing.assert_close(up @ down, pairs[0][1] @ pairs[0][0])


def test_pairs_are_aggregated_and_other_factors_averaged() -> None:
    pairs = clients(4)
    updates = [
        {
            f"{KEY}A": a.float(),
            f"{KEY}B": b.float(),
            f"{KEY}m": torch.full((7,), float(n)),
            "unet.b.nora_R": a[:, :2].float(),
        }
        for n, (a, b) in enumerate(pairs)
    ]
    found, error = aggregated(updates, WEIGHTS, "fair")
    down, up = fair(pairs, WEIGHTS)
    torch.testing.assert_close(found[f"{KEY}A"], down.float())
    torch.testing.assert_close(found[f"{KEY}B"], up.float())
    torch.testing.assert_close(found[f"{KEY}m"], torch.full((7,), 0.3 + 2 * 0.2))
    torch.testing.assert_close(
        found["unet.b.nora_R"],
        sum(w * a[:, :2] for (a, _), w in zip(pairs, WEIGHTS, strict=True)).float(),  # type: ignore[union-attr]
    )
    assert error == pytest.approx(float((up @ down - dense(pairs)).norm() / dense(pairs).norm()), rel=1e-5)


def test_inner_pairs_are_pairs() -> None:
    pairs = clients(5, (4, 4))
    updates = [{f"{KEY}A_in": a, f"{KEY}B_in": b} for a, b in pairs]
    one_sided = [{f"{KEY}A_in": a, f"{KEY}B": b} for a, b in pairs]
    for given in (updates, one_sided):
        found, _ = aggregated(given, WEIGHTS, "exact")
        down, up = exact(pairs, WEIGHTS)
        assert torch.equal(found[f"{KEY}A_in"], down)
        assert torch.equal(next(value for key, value in found.items() if "nora_B" in key), up)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"a": torch.ones(2)}, "dog sent other factors"),
        ({"a": torch.ones(3), "b": torch.ones(3)}, "dog sent other factors"),
        ({"a": torch.ones(3).half()}, "dog sent other factors"),
        ({"a": torch.tensor([1.0, float("nan"), 1.0])}, "dog sent NaN or infinity"),
    ],
)
def test_what_a_client_sends_is_checked(sent: dict[str, Tensor], message: str) -> None:
    like = {"a": torch.zeros(3)}
    assert torch.equal(unpacked(packed({"a": torch.ones(3)}), like, "dog")["a"], torch.ones(3))
    with pytest.raises(UserError, match=message):
        unpacked(packed(sent), like, "dog")
    with pytest.raises(UserError, match="dog sent no safetensors"):
        unpacked(b"junk", like, "dog")
