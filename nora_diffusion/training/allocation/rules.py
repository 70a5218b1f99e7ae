"""Rules that turn scores into ranks at a given number of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


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
