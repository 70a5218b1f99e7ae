"""Fingerprints of images, by which duplicates are found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

THUMB = 16


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """``dhash``: 64-bit difference hash. ``thumb``: 16 x 16 pixels, float32, without their mean brightness."""

    dhash: int
    thumb: np.ndarray[Any, Any]

    @classmethod
    def of(cls, image: Image.Image) -> Fingerprint:
        """The fingerprint of an RGB image."""
        pixels = np.asarray(image.resize((THUMB, THUMB), Image.Resampling.BOX), dtype=np.float32)
        return cls(dhash(image), pixels - pixels.mean())


def dhash(image: Image.Image) -> int:
    """64-bit difference hash: whether each of 9 x 8 gray means is brighter than its right neighbor.

    Small changes of size, brightness and compression flip few bits (N. Krawetz, "Kind of Like That", 2013).
    """
    gray = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = (gray[:, :-1] > gray[:, 1:]).ravel()
    return int(np.packbits(bits).view(">u8")[0])
