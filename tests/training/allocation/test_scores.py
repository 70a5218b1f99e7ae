"""Scores of ranks, against the formulas of their papers spelled out entry by entry."""

from __future__ import annotations

import math

import pytest
import torch

from nora_diffusion.training.allocation.penalties import mean_penalty, orthogonality, variance
from nora_diffusion.training.allocation.scores import (
    ablation,
    input_weighted,
    norm_shares,
    triplet_scores,
    update_sensitivity,
)


def test_sensitivity_is_smoothed_and_its_spread_as_well() -> None:
    """Of each weight by itself: ``I``, its mean and the mean of its distance from the new mean."""
    torch.manual_seed(0)
    shapes = [(3, 4), (5, 3), (3,)]
    means, spreads = ([torch.zeros(shape, dtype=torch.float64) for shape in shapes] for _ in range(2))
    expected = [[[0.0, 0.0] for _ in range(math.prod(shape))] for shape in shapes]
    for _ in range(3):
        weights, gradients = ([torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(2))
        update_sensitivity(means, spreads, weights, gradients)
        for own, weight, gradient in zip(expected, weights, gradients, strict=True):
            for entry, w, g in zip(own, weight.flatten().tolist(), gradient.flatten().tolist(), strict=True):
                entry[0] = 0.85 * entry[0] + 0.15 * abs(w * g)
                entry[1] = 0.85 * entry[1] + 0.15 * abs(abs(w * g) - entry[0])
    for own, mean, spread in zip(expected, means, spreads, strict=True):
        assert mean.flatten().tolist() == pytest.approx([entry[0] for entry in own])
        assert spread.flatten().tolist() == pytest.approx([entry[1] for entry in own])


def test_a_triplet_has_the_score_of_its_scale_and_the_mean_ones_of_its_vectors() -> None:
    scales, up, down = torch.rand(3), torch.rand(5, 3), torch.rand(3, 4)
    expected = [
        float(scales[i]) + sum(float(up[j, i]) for j in range(5)) / 5 + sum(float(down[i, j]) for j in range(4)) / 4
        for i in range(3)
    ]
    assert triplet_scores(scales, up, down).tolist() == pytest.approx(expected)


def test_norm_shares_are_those_of_the_dense_parts() -> None:
    torch.manual_seed(0)
    down, up = torch.randn(3, 6, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    up[:, 1] = 0
    whole = (up @ down).norm()
    expected = [float(torch.outer(up[:, i], down[i]).norm() / whole) for i in range(3)]
    assert norm_shares(down, up).tolist() == pytest.approx(expected)
    assert norm_shares(down, torch.zeros_like(up)).tolist() == [0, 0, 0]


def test_a_rank_is_worth_what_its_loss_costs_and_what_it_does_alone() -> None:
    """With ``S = -loss``: removing it costs 0.5, alone it reaches a loss of 0.75."""
    assert ablation(whole=1.0, without=1.5, alone=0.75) == -1.0 - (-1.5) + (-0.75)
    assert ablation(1.0, 1.5, 0.75) > ablation(1.0, 1.25, 0.75) > ablation(1.0, 1.25, 1.0)


def test_weights_count_by_their_inputs() -> None:
    down = torch.tensor([[1.0, -2.0], [-3.0, 0.5]])
    assert input_weighted(down, torch.tensor([4.0, 1.0])).tolist() == [[4.0, 2.0], [12.0, 0.5]]


def test_penalties_are_those_of_each_pair() -> None:
    torch.manual_seed(0)
    pairs = [(torch.randn(3, 4).double(), torch.randn(5, 3).double()) for _ in range(2)]
    pairs += [(torch.randn(1, 7).double(), torch.randn(2, 1).double())]
    dense = [
        float(torch.linalg.matrix_norm(up.T @ up - torch.eye(len(down)), "fro") ** 2)
        + float(torch.linalg.matrix_norm(down @ down.T - torch.eye(len(down)), "fro") ** 2)
        for down, up in pairs
    ]
    found = mean_penalty(orthogonality, [pairs[:2], pairs[2:]])
    assert float(found) == pytest.approx(sum(dense) / 3)
    spread = [
        sum(float(down[i].var()) + float(up[:, i].var()) for i in range(len(down))) / (2 * len(down))
        for down, up in pairs
    ]
    assert float(mean_penalty(variance, [pairs[:2], pairs[2:]])) == pytest.approx(sum(spread) / 3)


def test_orthonormal_factors_have_no_penalty() -> None:
    up, down = torch.linalg.qr(torch.randn(6, 3))[0], torch.linalg.qr(torch.randn(5, 3))[0].T
    assert float(mean_penalty(orthogonality, [[(down, up)]])) == pytest.approx(0, abs=1e-10)


def test_a_factor_of_one_entry_has_no_variance() -> None:
    assert float(mean_penalty(variance, [[(torch.ones(2, 1), torch.ones(3, 2))]])) == 0
