"""Choose the step to save, and decide when to stop early: plain functions of the validation scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...scoring.metrics import digits as digits

LOSS = "heldout_loss"
NAMES = {
    LOSS: "held-out loss",
    "dino": "DINO",
    "clip_i": "CLIP-I",
    "clip_t": "CLIP-T",
    "drift": "drift",
    "diversity": "diversity",
}
# +1: higher is better, -1: lower is better.
DIRECTIONS = {LOSS: -1, "dino": 1, "clip_i": 1, "clip_t": 1, "drift": -1, "diversity": 1}
COSTS = ("clip_t", "drift", "diversity")
MIN_GAIN = 0.8
"""A step can be chosen only if it has this share of the best gain in likeness over the base."""
MIN_RANGE = 0.02
"""Scores are cosines: if a score changes by less than this over a whole run, its changes are noise."""


@dataclass(frozen=True)
class Point:
    """Scores after ``step`` optimizer steps; step 0 is the base without the adapter."""

    step: int
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Verdict:
    """The rating of a step: its ``gain`` in likeness, relative to the best gain of the run, and its cost."""

    gain: float
    losses: Mapping[str, float]
    """How much worse than the base each score in ``COSTS`` is; 0 if it is not worse."""
    cost: float
    """Root mean square of the losses, each relative to its largest value in the run."""


def is_judged(points: Sequence[Point]) -> bool:
    """Whether images were scored; without judges the held-out loss is the only score."""
    return bool(points) and "clip_i" in points[0].scores


def likeness_of(scores: Mapping[str, float]) -> str:
    """The score used as likeness: DINO if it was measured, else CLIP-I."""
    return "dino" if "dino" in scores else "clip_i"


def verdicts(points: Sequence[Point]) -> dict[int, Verdict]:
    """``gain_s = (l_s - l_0) / max(max_t l_t - l_0, 0.02)``, ``cost_s = sqrt(mean_k (loss_ks / max_t loss_kt)^2)``.

    ``l``: likeness. Point 0: the base without the adapter, or the first point if measuring the base failed. A score
    better than the base's is a loss of 0. A largest loss below 0.02 counts as 0.02. Empty if no images were scored.
    """
    if not is_judged(points):
        return {}
    base = points[0].scores
    name = likeness_of(base)
    best_gain = max(max(point.scores[name] for point in points) - base[name], MIN_RANGE)
    keys = [key for key in COSTS if key in base]
    losses = {p.step: {k: max(DIRECTIONS[k] * (base[k] - p.scores[k]), 0.0) for k in keys} for p in points}
    largest = {key: max(MIN_RANGE, *(by_key[key] for by_key in losses.values())) for key in keys}
    return {
        point.step: Verdict(
            (point.scores[name] - base[name]) / best_gain,
            losses[point.step],
            math.sqrt(sum((losses[point.step][key] / largest[key]) ** 2 for key in keys) / len(keys)),
        )
        for point in points
    }


def choose(points: Sequence[Point]) -> int | None:
    """The step to save: the lowest cost among trained steps with at least ``MIN_GAIN`` of the best gain.

    Ties go to the higher likeness, then to the earlier step. If no images were scored: the lowest held-out loss.
    ``None`` if no trained step was measured.
    """
    if points and not is_judged(points):
        losses = [(point.scores[LOSS], point.step) for point in points if point.step > 0]
        return min(losses)[1] if losses else None
    trained = {step: verdict for step, verdict in verdicts(points).items() if step > 0}
    if not trained:
        return None
    best = max(verdict.gain for verdict in trained.values())
    candidates = {step: v for step, v in trained.items() if v.gain >= (MIN_GAIN * best if best > 0 else best)}
    return min(candidates, key=lambda step: (candidates[step].cost, -candidates[step].gain, step))


def front(points: Sequence[Point]) -> list[int]:
    """The Pareto front of trained steps, over likeness and every loss, or the best step if no images were scored."""
    if points and not is_judged(points):
        return [step] if (step := choose(points)) is not None else []
    trained = {step: verdict for step, verdict in verdicts(points).items() if step > 0}
    others = list(trained.values())
    return [step for step, verdict in trained.items() if not any(dominates(other, verdict) for other in others)]


def dominates(one: Verdict, other: Verdict) -> bool:
    """Whether ``one`` is at least as good as ``other`` in likeness and every loss, and better in at least one."""
    pairs = [(one.gain, other.gain), *((-one.losses[key], -other.losses[key]) for key in one.losses)]
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def stalled(points: Sequence[Point], patience: int | None) -> bool:
    """Whether ``patience`` points were measured after the chosen step."""
    chosen = choose(points)
    if patience is None or chosen is None:
        return False
    return sum(point.step > chosen for point in points) >= patience


def reason(points: Sequence[Point], kept: int, last: int) -> str:
    """A sentence that explains why step ``kept`` of a run that ended at step ``last`` is in the file."""
    chosen = choose(points)
    if chosen is None:
        return "Nothing was measured, so the last step is kept."
    if not is_judged(points):
        return _reason_of_loss(points, chosen, kept, last)
    found, base = verdicts(points), points[0].scores
    name, costs = NAMES[likeness_of(base)], [NAMES[key] for key in COSTS if key in base]
    verdict = found[chosen]
    text = (
        f"Step {chosen} is kept: of the steps with at least {MIN_GAIN:.0%} of the best gain in likeness over the base "
        f"({name}, here {verdict.gain:.0%}) it has the lowest cost in "
        f"{', '.join(costs[:-1])} and {costs[-1]} ({verdict.cost:.2f})."
    )
    text = _unless_lost(text, chosen, kept)
    if chosen == last:
        return text
    if last not in found:
        return f"{text} The last step, {last}, was not measured."
    return f"{text} The last step, {last}, has {found[last].gain:.0%} of the gain, at a cost of {found[last].cost:.2f}."


def _reason_of_loss(points: Sequence[Point], chosen: int, kept: int, last: int) -> str:
    losses = {point.step: point.scores[LOSS] for point in points}
    base = f", {losses[0]:.4f} without the adapter" if 0 in losses else ""
    text = _unless_lost(
        f"Step {chosen} is kept: it has the lowest held-out loss ({losses[chosen]:.4f}{base}).", chosen, kept
    )
    if chosen == last or last not in losses:
        return text
    return f"{text} That of the last step, {last}, is {losses[last]:.4f}."


def _unless_lost(text: str, chosen: int, kept: int) -> str:
    if kept == chosen:
        return text
    return f"{text.replace('is kept', 'would be kept')} Its adapter could not be read, so step {kept} is kept."
