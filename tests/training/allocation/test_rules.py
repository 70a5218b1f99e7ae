"""Rules: ranks of a given size, from what each further rank of a layer is worth."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from nora_diffusion.training.allocation.rules import allocate, best, beyond_mass, handed_over, lowest_half


def test_ranks_go_where_they_are_worth_most() -> None:
    scores = {"flat": [5.0, 4.0, 3.0], "steep": [9.0, 1.0, 0.5], "nothing": [0.0, 0.0, 0.0]}
    assert allocate(scores, dict.fromkeys(scores, 10), 60) == {"flat": 3, "steep": 2, "nothing": 1}


def test_a_score_counts_by_its_parameters() -> None:
    scores = {"narrow": [2.0, 2.0], "wide": [3.0, 3.0]}
    assert allocate(scores, {"narrow": 10, "wide": 20}, 50) == {"narrow": 2, "wide": 1}


def test_what_no_longer_fits_leaves_room_for_less() -> None:
    scores = {"wide": [9.0, 9.0], "narrow": [1.0, 0.1]}
    assert allocate(scores, {"wide": 100, "narrow": 10}, 130) == {"wide": 1, "narrow": 2}


@pytest.mark.parametrize("seed", range(20))
def test_the_size_is_kept_and_no_rank_of_equal_cost_would_be_worth_more(seed: int) -> None:
    """With equal costs, greedy is optimal: no other ranks of the same size have a larger sum of scores."""
    draw = random.Random(seed)
    scores = {name: sorted((draw.random() for _ in range(4)), reverse=True) for name in "abc"}
    total = draw.randint(3, 12) * 7 + draw.randint(0, 6)
    ranks = allocate(scores, dict.fromkeys(scores, 7), total)
    assert sum(ranks.values()) == total // 7 and all(1 <= rank <= 4 for rank in ranks.values())

    def worth(choice: dict[str, int]) -> float:
        return sum(sum(scores[name][:rank]) for name, rank in choice.items())

    others = (dict(zip(scores, c, strict=True)) for c in itertools.product(range(1, 5), repeat=3))
    assert worth(ranks) == pytest.approx(max(worth(c) for c in others if sum(c.values()) == sum(ranks.values())))


def test_the_best_are_kept_and_the_first_of_equals() -> None:
    assert best(torch.tensor([1.0, 3.0, 2.0, 3.0]), 2).tolist() == [False, True, False, True]
    assert best(torch.tensor([1.0, 1.0, 1.0]), 2).tolist() == [True, True, False]
    assert best(torch.tensor([1.0, 2.0]), 5).tolist() == [True, True]


def test_half_of_each_row_is_lowest() -> None:
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0, 5.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert lowest_half(scores).tolist() == [[False, True, False, True, False], [True, True, False, False, False]]
    assert lowest_half(torch.ones(2, 1)).tolist() == [[False], [False]]


def test_ranks_beyond_the_mass_are_replaced_the_weakest_first() -> None:
    weights = torch.tensor([0.5, 0.02, 0.3, 0.08, 0.1])  # in order: 0.5, 0.8, 0.9, 0.98, 1
    assert beyond_mass(weights, 0.95).tolist() == [1, 3]
    assert beyond_mass(weights, 0.99).tolist() == [1]
    assert beyond_mass(weights, 1.0).tolist() == []
    assert beyond_mass(torch.tensor([1.0, 0.0, 0.0, 0.0]), 0.5).tolist() == [3, 2]  # at most half
    assert beyond_mass(torch.ones(1), 0.5).tolist() == []


def test_freed_ranks_go_to_layers_that_lost_none() -> None:
    assert handed_over([2, 0, 0, 1], [9, 9, 9, 9], [9.0, 1.0, 2.0, 9.0], 3) == [0, 1, 2, 0]
    assert handed_over([0, 0], [1, 0], [1.0, 2.0], 5) == [1, 0]  # no more than there is room for
    assert handed_over([1, 1], [5, 5], [1.0, 2.0], 2) == [0, 0]
