"""Which of the measured steps to keep, and when to stop: the rule, as plain functions of the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NAMES = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T", "drift": "drift", "diversity": "diversity"}
# What is better: +1 more of it, -1 less of it.
DIRECTIONS = {"dino": 1, "clip_i": 1, "clip_t": 1, "drift": -1, "diversity": 1}
KEPT = ("clip_t", "drift", "diversity")
ENOUGH = 0.8
"""The share of the best likeness's gain over the base's that a step must have to be kept."""
LEAST_RANGE = 0.02
"""Scores are cosines: where a whole run moves one by less than this, its ups and downs are noise."""


@dataclass(frozen=True)
class Point:
    """What was measured after ``step`` optimizer steps; step 0 is the base alone."""

    step: int
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Verdict:
    """How good a step is: its ``gain`` in likeness as a share of the best one's, and what it cost."""

    gain: float
    losses: Mapping[str, float]
    """How far each of ``KEPT`` fell below the base's (or rose above it, for drift); 0 where it did not."""
    cost: float
    """The root mean square of the losses, each as a share of the largest one of the run."""


def likeness_of(scores: Mapping[str, float]) -> str:
    """The score that stands for likeness: DINO if it was measured, else CLIP-I."""
    return "dino" if "dino" in scores else "clip_i"


def verdicts(points: Sequence[Point]) -> dict[int, Verdict]:
    """``gain_s = (l_s - l_0) / max(max_t l_t - l_0, 0.02)``, ``cost_s = sqrt(mean_k (loss_ks / max_t loss_kt)^2)``.

    ``l`` is likeness, point 0 the base alone (the first point, if it could not be measured). What is better than the
    base's is no loss: a half-learned subject is diverse. A largest loss below 0.02 counts as 0.02.
    """
    if not points:
        return {}
    base = points[0].scores
    name = likeness_of(base)
    most = max(max(point.scores[name] for point in points) - base[name], LEAST_RANGE)
    kept = [key for key in KEPT if key in base]
    losses = {p.step: {k: max(DIRECTIONS[k] * (base[k] - p.scores[k]), 0.0) for k in kept} for p in points}
    largest = {key: max(LEAST_RANGE, *(own[key] for own in losses.values())) for key in kept}
    return {
        point.step: Verdict(
            (point.scores[name] - base[name]) / most,
            losses[point.step],
            math.sqrt(sum((losses[point.step][key] / largest[key]) ** 2 for key in kept) / len(kept)),
        )
        for point in points
    }


def choose(points: Sequence[Point]) -> int | None:
    """The step to keep: the cheapest of those trained that have ``ENOUGH`` of the gain of the best of them.

    Of equals the one with more likeness, then the earlier one.
    """
    trained = {step: verdict for step, verdict in verdicts(points).items() if step > 0}
    if not trained:
        return None
    best = max(verdict.gain for verdict in trained.values())
    enough = {step: v for step, v in trained.items() if v.gain >= (ENOUGH * best if best > 0 else best)}
    return min(enough, key=lambda step: (enough[step].cost, -enough[step].gain, step))


def front(points: Sequence[Point]) -> list[int]:
    """The Pareto front: trained steps that no other trained step beats in likeness and in every loss."""
    trained = {step: verdict for step, verdict in verdicts(points).items() if step > 0}
    return [step for step, own in trained.items() if not any(dominates(other, own) for other in trained.values())]


def dominates(one: Verdict, other: Verdict) -> bool:
    """Whether ``one`` is at least as good in likeness and in every loss, and better in something."""
    pairs = [(one.gain, other.gain), *((-one.losses[key], -other.losses[key]) for key in one.losses)]
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def stalled(points: Sequence[Point], patience: int | None) -> bool:
    """Whether the choice has stayed the same for ``patience`` further points."""
    chosen = choose(points)
    if patience is None or chosen is None:
        return False
    return sum(point.step > chosen for point in points) >= patience


def reason(points: Sequence[Point], kept: int, last: int) -> str:
    """Why the file holds step ``kept`` of a run that ended at step ``last``, in words."""
    chosen = choose(points)
    if chosen is None:
        return "Nothing was measured, so the last step is kept."
    found, base = verdicts(points), points[0].scores
    name, costs = NAMES[likeness_of(base)], [NAMES[key] for key in KEPT if key in base]
    own = found[chosen]
    said = (
        f"Step {chosen} is kept: of the steps with at least {ENOUGH:.0%} of the best gain in likeness over the base "
        f"({name}, here {own.gain:.0%}) it cost least in {', '.join(costs[:-1])} and {costs[-1]} ({own.cost:.2f})."
    )
    if kept != chosen:
        said = f"{said.replace('is kept', 'would be kept')} Its adapter could not be read, so step {kept} is kept."
    if chosen == last:
        return said
    if last not in found:
        return f"{said} The last step, {last}, was not measured."
    return f"{said} The last step, {last}, has {found[last].gain:.0%} of the gain, at a cost of {found[last].cost:.2f}."
