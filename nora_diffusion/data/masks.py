"""Subject masks: the file that :func:`.folder.find_masks` finds, else the alpha channel of the image itself."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError
from .folder import MASK_FOLDERS, enumerated, find_masks
from .images import Mask, SourceImage, UnreadableImageError, read_source
from .transforms import Box

log = logging.getLogger(__name__)

MAX_ASPECT_ERROR = 0.02
HALF = 128


def with_masks(images: Sequence[SourceImage], folder: Path) -> list[SourceImage]:
    """The images with their ``mask`` (the subject in white), if they have one.

    Raises :class:`UserError` if no image has one, or if a mask is empty or of another shape than its image.
    """
    files, unused = find_masks(folder, [image.path for image in images])
    if unused:
        log.warning("%s: no photo has the name of %s", folder, enumerated([path.name for path in unused]))
    masked = [replace(image, mask=_mask(image, files.get(image.path))) for image in images]
    if all(image.mask is None for image in masked):
        raise UserError(
            f"no photo in {folder} has a mask: put black and white images with the photos' names into "
            f"{folder / MASK_FOLDERS[0]}, or use photos with a transparent background"
        )
    return masked


def _mask(source: SourceImage, path: Path | None) -> Mask | None:
    if path is None and not source.is_transparent:
        return None
    file = None if path is None else _mask_file(path)
    name = "the transparency of the photo" if path is None else f"the mask {path}"
    mask = _stored(source, file)
    if file is not None and abs(mask.width * source.size[1] / (mask.height * source.size[0]) - 1) > MAX_ASPECT_ERROR:
        sizes = ["{}x{}".format(*size) for size in (mask.size, source.size)]
        raise UserError(f"{name} is {sizes[0]}, its photo {sizes[1]}: make one of the photo's size")
    mask = _resized(mask, source)
    box = subject_box(mask)
    if box is None:
        remedy = "paint it white, or remove the mask" if file else "make it opaque, or put a mask into masks/"
        raise UserError(f"{name} {'' if file else source.path.name + ' '}shows no subject: {remedy}")
    return Mask(file, box, mask_hash(mask), float(np.asarray(mask).mean() / 255))


def _mask_file(path: Path) -> SourceImage:
    try:
        return read_source(path)
    except UnreadableImageError as error:
        raise UserError(f"the mask {path} cannot be used ({error}): replace or remove it") from error


def mask_pixels(source: SourceImage) -> Image.Image | None:
    """The mask of an image, at its size (mode ``L``); ``None`` if it has none."""
    return None if source.mask is None else _resized(_stored(source, source.mask.file), source)


def _stored(source: SourceImage, file: SourceImage | None) -> Image.Image:
    decoded = (file or source).decode()
    return decoded.alpha or decoded.image.convert("L")


def _resized(mask: Image.Image, source: SourceImage) -> Image.Image:
    return mask.resize(source.size, Image.Resampling.BILINEAR)


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
