"""Where the subject is in a photo: a picture of the same name in ``masks/``, else the photo's own transparency."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError
from .formats import is_picture
from .images import SourceImage, listed, read_source
from .transforms import Box

log = logging.getLogger(__name__)

FOLDER = "masks"
MAX_ASPECT_ERROR = 0.02
HALF = 128


def with_masks(photos: Sequence[SourceImage], folder: Path) -> list[SourceImage]:
    """The photos with a ``mask`` (``L``, the photo's size, white where the subject is) where there is one.

    Raises :class:`UserError` if no photo has one, or if one is empty or of another shape than its photo.
    """
    files = {path.stem: path for path in sorted((folder / FOLDER).glob("*")) if is_picture(path)}
    lost = sorted(path.name for stem, path in files.items() if stem not in {photo.path.stem for photo in photos})
    if lost:
        log.warning("%s: no photo has the name of %s", folder / FOLDER, listed(lost))
    found = [replace(photo, mask=_mask(photo, files.get(photo.path.stem))) for photo in photos]
    if all(photo.mask is None for photo in found):
        raise UserError(
            f"no photo in {folder} has a mask: put black and white pictures of the photos' names into "
            f"{folder / FOLDER}, or use photos with a transparent background"
        )
    return found


def _mask(photo: SourceImage, file: Path | None) -> Image.Image | None:
    if file is None:
        return photo.alpha
    read = read_source(file)
    mask = read.alpha or read.image.convert("L")
    aspects = [image.width / image.height for image in (mask, photo.image)]
    if abs(aspects[0] / aspects[1] - 1) > MAX_ASPECT_ERROR:
        sizes = ["{}x{}".format(*image.size) for image in (mask, photo.image)]
        raise UserError(f"the mask {file} is {sizes[0]}, its photo {sizes[1]}: make one of the photo's size")
    if subject_box(mask) is None:
        raise UserError(f"the mask {file} shows no subject: paint it white, or remove the mask")
    return mask.resize(photo.image.size, Image.Resampling.BILINEAR)


def subject_box(mask: Image.Image) -> Box | None:
    """Left, top, right and bottom of what is white; ``None`` where nothing is."""
    inside = np.asarray(mask) >= HALF
    columns, rows = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
    if not columns.size:
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def mask_hash(mask: Image.Image) -> str:
    """SHA-256 of a mask's size and numbers."""
    return hashlib.sha256(repr(mask.size).encode() + mask.tobytes()).hexdigest()
