"""Subject masks: an image of the same name in ``masks/``, else the alpha channel of the image itself."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError
from .formats import is_image
from .images import SourceImage, enumerated, read_source
from .transforms import Box

log = logging.getLogger(__name__)

FOLDER = "masks"
MAX_ASPECT_ERROR = 0.02
HALF = 128


def with_masks(images: Sequence[SourceImage], folder: Path) -> list[SourceImage]:
    """The images with their ``mask`` (mode ``L``, the image's size, the subject in white), if they have one.

    Raises :class:`UserError` if no image has one, or if a mask is empty or of another shape than its image.
    """
    files = {path.stem: path for path in sorted((folder / FOLDER).glob("*")) if is_image(path)}
    unused = sorted(path.name for stem, path in files.items() if stem not in {image.path.stem for image in images})
    if unused:
        log.warning("%s: no photo has the name of %s", folder / FOLDER, enumerated(unused))
    masked = [replace(image, mask=_mask(image, files.get(image.path.stem))) for image in images]
    if all(image.mask is None for image in masked):
        raise UserError(
            f"no photo in {folder} has a mask: put black and white images with the photos' names into "
            f"{folder / FOLDER}, or use photos with a transparent background"
        )
    return masked


def _mask(source: SourceImage, file: Path | None) -> Image.Image | None:
    if file is None:
        return source.alpha
    read = read_source(file)
    mask = read.alpha or read.image.convert("L")
    aspects = [image.width / image.height for image in (mask, source.image)]
    if abs(aspects[0] / aspects[1] - 1) > MAX_ASPECT_ERROR:
        sizes = ["{}x{}".format(*image.size) for image in (mask, source.image)]
        raise UserError(f"the mask {file} is {sizes[0]}, its photo {sizes[1]}: make one of the photo's size")
    if subject_box(mask) is None:
        raise UserError(f"the mask {file} shows no subject: paint it white, or remove the mask")
    return mask.resize(source.image.size, Image.Resampling.BILINEAR)


def subject_box(mask: Image.Image) -> Box | None:
    """Left, top, right and bottom of the white area; ``None`` if there is none."""
    inside = np.asarray(mask) >= HALF
    columns, rows = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
    if not columns.size:
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def mask_hash(mask: Image.Image) -> str:
    """SHA-256 of a mask's size and pixels."""
    return hashlib.sha256(repr(mask.size).encode() + mask.tobytes()).hexdigest()
