"""Scores from image features: similarity, agreement and diversity, and bootstrap intervals of their means.

Features are unit vectors ``[n, d]`` (:mod:`.judges`), so a product is a cosine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

LEVEL = 0.95
RESAMPLES = 2000


def likeness(features: Tensor, references: Tensor) -> list[float]:
    """The mean cosine of each image to the references: CLIP-I or DINO (DreamBooth, arXiv 2208.12242)."""
    return [float(value) for value in (features @ references.T).mean(1)]


def agreement(features: Tensor, others: Tensor) -> list[float]:
    """The cosine of each row pair: images with their prompts give CLIP-T, with the base's images ``1 - drift``."""
    return [float(value) for value in (features * others).sum(-1)]


def diversity(features: Tensor) -> float:
    """``1 - cos``, averaged over all pairs of images of one prompt; NaN for a single image."""
    count = len(features)
    if count < 2:
        return float("nan")
    cosines = features @ features.T
    return 1 - float((cosines.sum() - cosines.trace()) / (count * (count - 1)))


def resampled(groups: Mapping[str, Sequence[int]], resamples: int = RESAMPLES, seed: int = 0) -> list[np.ndarray]:
    """The rows of each resample of a two-stage bootstrap: draw groups with replacement, then rows of each drawn group.

    ``groups`` has the row indices of each subject. Scores of one subject are correlated, so drawing rows alone would
    give intervals that are too narrow. With one group, only rows are drawn.
    """
    random = np.random.default_rng(seed)
    rows = [np.asarray(list(members)) for members in groups.values()]
    drawn = []
    for _ in range(resamples):
        chosen = random.integers(0, len(rows), len(rows))
        drawn.append(np.concatenate([random.choice(rows[i], len(rows[i])) for i in chosen]))
    return drawn


def interval(values: Sequence[float], draws: Sequence[np.ndarray], level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of the mean of ``values`` over the resamples of :func:`resampled`."""
    array = np.asarray(values, dtype=float)
    means = np.array([array[rows].mean() for rows in draws])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def digits(name: str) -> int:
    """Decimals of a score in tables; losses resolve smaller differences."""
    return 4 if name.endswith("loss") else 3
