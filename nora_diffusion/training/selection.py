"""Which of the measured steps to keep, and when to stop: the rule, as plain functions of the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# What is better: +1 more of it, -1 less of it.
DIRECTIONS = {"dino": 1, "clip_i": 1, "clip_t": 1, "drift": -1, "diversity": 1}
KEPT = ("clip_t", "drift", "diversity")
LEAST_RANGE = 0.02
"""Scores are cosines: where a whole run moves one by less than this, its ups and downs are noise."""


@dataclass(frozen=True)
class Point:
    """What was measured after ``step`` optimizer steps; step 0 is the base alone."""

    step: int
    scores: Mapping[str, float]


def weights(scores: Mapping[str, float]) -> dict[str, float]:
    """Half for likeness (DINO if measured, else CLIP-I), the other half shared by what training must not cost."""
    likeness = "dino" if "dino" in scores else "clip_i"
    kept = [name for name in KEPT if name in scores]
    return {likeness: 0.5} | {name: 0.5 / len(kept) for name in kept}


def distances(points: Sequence[Point]) -> dict[int, float]:
    """Each step's weighted distance to the best of everything: ``sqrt(sum_k w_k ((best_k - s_k) / range_k)^2)``.

    ``best`` and ``range`` are taken over all points, the base alone included (compromise programming, Zeleny 1973).
    """
    if not points:
        return {}
    total = dict.fromkeys((point.step for point in points), 0.0)
    for name, weight in weights(points[0].scores).items():
        values = [DIRECTIONS[name] * point.scores[name] for point in points]
        best, size = max(values), max(max(values) - min(values), LEAST_RANGE)
        for point, value in zip(points, values, strict=True):
            total[point.step] += weight * ((best - value) / size) ** 2
    return {step: math.sqrt(value) for step, value in total.items()}


def choose(points: Sequence[Point]) -> int | None:
    """The step to keep: of those trained the one nearest to the best of everything, the earlier one of equals."""
    trained = {step: far for step, far in distances(points).items() if step > 0}
    return min(trained, key=lambda step: (trained[step], step)) if trained else None


def front(points: Sequence[Point]) -> list[int]:
    """The Pareto front: trained steps that no other trained step beats or equals in everything weighed."""
    trained = [point for point in points if point.step > 0]
    return [point.step for point in trained if not any(dominates(other, point) for other in trained)]


def dominates(one: Point, other: Point) -> bool:
    """Whether ``one`` is at least as good in everything that is weighed, and better in something."""
    pairs = [(DIRECTIONS[n] * one.scores[n], DIRECTIONS[n] * other.scores[n]) for n in weights(one.scores)]
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def stalled(points: Sequence[Point], patience: int | None) -> bool:
    """Whether the choice has stayed the same for ``patience`` further points."""
    chosen = choose(points)
    if patience is None or chosen is None:
        return False
    return sum(point.step > chosen for point in points) >= patience


def reason(points: Sequence[Point]) -> str:
    """The choice and why, in words."""
    chosen, last = choose(points), points[-1].step if points else 0
    if chosen is None:
        return "Nothing was measured, so the last step is kept."
    far = distances(points)
    names = list(weights(points[0].scores))
    said = (
        f"Step {chosen} is kept: of the {len(far) - (0 in far)} steps measured it is the nearest to the best of "
        f"everything, at a distance of {far[chosen]:.3f}, where {names[0]} counts half and {', '.join(names[1:])} "
        "share the other half, each relative to its range in this run."
    )
    return said if chosen == last else f"{said} The last step, {last}, is at {far[last]:.3f}."
