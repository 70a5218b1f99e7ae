"""How often values lay in which range; histograms of several engines can be added."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


@dataclass(frozen=True)
class Histogram:
    """``counts[i]``: values of at most ``bounds[i]`` and above the bound before; the last one: above all bounds."""

    bounds: Sequence[float] = SECONDS
    counts: tuple[int, ...] = ()
    sum: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", self.counts or (0,) * (len(self.bounds) + 1))

    def with_value(self, value: float) -> Histogram:
        """The histogram with one more value."""
        place = bisect_left(self.bounds, value)
        counts = tuple(count + (index == place) for index, count in enumerate(self.counts))
        return Histogram(self.bounds, counts, self.sum + value)

    def __add__(self, other: Histogram) -> Histogram:
        counts = tuple(one + two for one, two in zip(self.counts, other.counts, strict=True))
        return Histogram(self.bounds, counts, self.sum + other.sum)


NO_ROWS, NO_SECONDS = Histogram(ROWS), Histogram(SECONDS)
"""Without values."""
