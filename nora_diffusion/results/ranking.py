"""What a leaderboard says of each method: its score at a rate chosen on other subjects, and paired differences."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np

from ..scoring.metrics import interval, resampled
from .protocols import Protocol
from .schema import Row

Values = Mapping[tuple[str, int], float]
"""A score by subject and seed."""
T = TypeVar("T")


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% bootstrap interval: subjects are drawn, then rows of each. NaN ends if there is none."""

    mean: float
    low: float
    high: float

    def text(self, form: str) -> str:
        """The mean, and the interval if there is one; ``form`` as in ``+.4f``."""
        ends = "" if math.isnan(self.low) else f" [{self.low:{form}}, {self.high:{form}}]"
        return f"{self.mean:{form}}{ends}"


@dataclass(frozen=True)
class Standing:
    """A method in a protocol. ``rates``: the chosen ones. ``at_end``: one of them is the first or last tried."""

    method: str
    rows: Sequence[Row]
    rates: Sequence[float]
    at_end: bool
    trained_parameters: int
    bytes: int
    seconds: float
    scores: dict[str, Estimate]


@dataclass(frozen=True)
class Ranking:
    """The methods of a protocol that train something, the best first."""

    protocol: Protocol
    standings: Sequence[Standing]


def rank(protocol: Protocol) -> Ranking:
    """Rank the methods of a protocol by the means of its criterion."""
    found = [_standing(protocol, method) for method in protocol.trained]
    found.sort(key=lambda s: _sign(protocol, protocol.criterion) * s.scores[protocol.criterion].mean)
    return Ranking(protocol, found)


def control(protocol: Protocol, method: str) -> dict[str, Estimate]:
    """The scores of the base alone."""
    return _estimates(protocol, protocol.of(method))


def _standing(protocol: Protocol, method: str) -> Standing:
    rows = at_best_rate(protocol, method)
    tried = sorted({row.rate for row in protocol.of(method) if row.rate is not None})
    rates = sorted({row.rate for row in rows if row.rate is not None})
    at_end = len(tried) > 1 and bool({tried[0], tried[-1]} & {*rates})
    size = max(rows, key=lambda row: row.trained_parameters)  # 0 in a row whose training failed
    seconds = statistics.median(row.seconds for row in rows)
    return Standing(
        method, rows, rates, at_end, size.trained_parameters, size.bytes, seconds, _estimates(protocol, rows)
    )


def at_best_rate(protocol: Protocol, method: str) -> list[Row]:
    """The rows of a method at the rates of :func:`chosen`, of those tried on the most pairs of subject and seed."""
    rows = [row for row in protocol.of(method) if protocol.criterion in row.scores]
    counts = Counter(row.rate for row in rows)
    most = max(counts.values())
    rows = [row for row in rows if counts[row.rate] == most]
    sign = _sign(protocol, protocol.criterion)
    return chosen(rows, [Tried(row.subject, row.rate, sign * row.scores[protocol.criterion]) for row in rows])


class Tried(NamedTuple):
    """What a rate came to for a subject; a lower cost is better."""

    subject: str
    rate: float | None
    cost: float


def chosen(rows: Sequence[T], tried: Sequence[Tried]) -> list[T]:
    """Of the rows of a method, of which each came to one of ``tried``: for each subject those at its best rate.

    That is the rate that is best for the *other* subjects: choosing it on the reported rows would favor the method with
    the larger noise. A single subject has no others, so it is its own judge.
    """
    best = {subject: _best_rate(tried, subject) for subject in dict.fromkeys(own.subject for own in tried)}
    return [row for row, own in zip(rows, tried, strict=True) if own.rate == best[own.subject]]


def _best_rate(tried: Sequence[Tried], subject: str) -> float | None:
    others = [own for own in tried if own.subject != subject] or tried
    rates = dict.fromkeys(own.rate for own in others)
    return min(rates, key=lambda rate: statistics.fmean(own.cost for own in others if own.rate == rate))


def _sign(protocol: Protocol, score: str) -> int:
    """+1 if lower is better."""
    return 1 if protocol.scores[score] == "lower" else -1


def _estimates(protocol: Protocol, rows: Sequence[Row]) -> dict[str, Estimate]:
    """The means; with an interval that of the criterion."""
    names = [name for name in protocol.scores if all(name in row.scores for row in rows)]
    subjects = [row.subject for row in rows]
    values = {name: [row.scores[name] for row in rows] for name in names}
    found = {name: Estimate(statistics.fmean(own), math.nan, math.nan) for name, own in values.items()}
    return found | {name: estimate(values[name], subjects) for name in names if name == protocol.criterion}


def estimate(values: Sequence[float], subjects: Sequence[str]) -> Estimate:
    """The mean of values, of which each belongs to a subject. An infinite mean and a single value have no interval."""
    mean = statistics.fmean(values)
    if not math.isfinite(mean) or len(values) == 1:
        return Estimate(mean, math.nan, math.nan)
    groups: dict[str, list[int]] = {}
    for number, subject in enumerate(subjects):
        groups.setdefault(subject, []).append(number)
    return Estimate(mean, *interval(values, _draws(tuple(map(tuple, groups.values())))))


@lru_cache(4)
def _draws(groups: tuple[tuple[int, ...], ...]) -> list[np.ndarray]:
    """The resamples, the same for all methods and scores with as many rows of each subject."""
    return resampled({str(number): rows for number, rows in enumerate(groups)})


def difference(one: Standing, other: Standing, score: str) -> Estimate | None:
    """The mean difference of a score, paired by subject and seed; ``None`` if there is no pair.

    Methods that have no seed in common are paired by subject, at their means over seeds.
    """
    for with_seed in (True, False):
        if found := paired(*(_by_pair(standing.rows, score, with_seed) for standing in (one, other))):
            return found
    return None


def paired(ours: Values, theirs: Values) -> Estimate | None:
    """The mean difference over the pairs of subject and seed that both have; ``None`` if there is none."""
    common = [pair for pair in ours if pair in theirs]
    gaps = [ours[pair] - theirs[pair] for pair in common]
    return estimate(gaps, [subject for subject, _ in common]) if common else None


def _by_pair(rows: Sequence[Row], score: str, with_seed: bool) -> Values:
    values: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if score in row.scores:
            values.setdefault((row.subject, row.seed if with_seed else 0), []).append(row.scores[score])
    return {pair: statistics.fmean(own) for pair, own in values.items()}


def front(ranking: Ranking) -> set[str]:
    """The Pareto front: methods that no other one equals with as few trained parameters, by means of the criterion."""
    name = ranking.protocol.criterion
    sign = _sign(ranking.protocol, name)
    points = {s.method: (s.trained_parameters, sign * s.scores[name].mean) for s in ranking.standings}

    def beaten(own: tuple[float, float]) -> bool:
        return any(a <= own[0] and b <= own[1] and (a, b) != own for a, b in points.values())

    return {method for method, point in points.items() if math.isfinite(point[1]) and not beaten(point)}
