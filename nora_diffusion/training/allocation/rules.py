"""Rules: what scores and a budget mean for the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def allocate(scores: Mapping[str, Sequence[float]], costs: Mapping[str, int], total: int) -> dict[str, int]:
    """The rank of each layer: the ranks with the largest scores per parameter, of at most ``total`` parameters.

    ``scores``: what each further rank of a layer is worth, in descending order; a layer has at most that many ranks
    and at least one. ``costs``: parameters of one rank of a layer. Greedy, which for a knapsack is optimal up to its
    last items: a rank that no longer fits is left out, and cheaper ones are still tried.
    """
    ranks = dict.fromkeys(scores, 1)
    left = total - sum(costs[path] for path in ranks)
    further = [(path, score / costs[path]) for path, own in scores.items() for score in own[1:]]
    for path, _ in sorted(further, key=lambda item: -item[1]):  # stable: equal scores keep the order of the layers
        if costs[path] <= left:
            ranks[path] += 1
            left -= costs[path]
    return ranks


def best(scores: Tensor, count: int) -> Tensor:
    """Whether each score is among the ``count`` largest; of equal ones the first are."""
    kept = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    kept[scores.argsort(descending=True, stable=True)[:count]] = True
    return kept


def lowest_half(scores: Tensor) -> Tensor:
    """Whether each score ``[k, n]`` is in the lowest half of its row, ``n // 2`` of each; of equal ones the first."""
    lowest = scores.argsort(dim=1, stable=True)[:, : scores.shape[1] // 2]
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(1, lowest, True)


def beyond_mass(weights: Tensor, mass: float) -> Tensor:
    """Indices of the ranks to replace, the weakest first: those beyond the largest with this share of all ``weights``.

    At most half of them, since each takes over from one that stays. https://arxiv.org/abs/2502.13604
    """
    order = weights.argsort(descending=True, stable=True)
    total = weights[order].double().cumsum(0)
    count = min(int((total > mass * total[-1]).sum()), len(weights) // 2)
    return order.flip(0)[:count]


def handed_over(lost: Sequence[int], room: Sequence[int], worth: Sequence[float], count: int) -> list[int]:
    """How many of ``count`` freed ranks each layer gets: one in turn, the layers of most ``worth`` first.

    A layer that ``lost`` ranks gets none, and no layer more than its ``room``. https://arxiv.org/abs/2403.16187
    """
    gained = [0] * len(lost)
    order = [i for i in sorted(range(len(lost)), key=lambda i: -worth[i]) if not lost[i]]
    while count and any(gained[i] < room[i] for i in order):
        for i in order:
            if count and gained[i] < room[i]:
                gained[i] += 1
                count -= 1
    return gained
