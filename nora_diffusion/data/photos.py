"""Photos of a subject: found, checked before they are decoded, made upright and RGB, cropped and resized."""

from __future__ import annotations

import hashlib
import io
import logging
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from ..errors import UserError

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FOREIGN_SUFFIXES = (".heic", ".heif", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jxl")
# Pillow opens MPO, which some phones write as .jpg, through JPEG.
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 40_000_000
MIN_SIDE = 16
MAX_ASPECT = 8.0
BACKGROUND = (255, 255, 255)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Photo:
    """One decoded photo: an upright RGB picture and the SHA-256 of the file it came from."""

    path: Path
    image: Image.Image
    sha256: str


class UnreadablePhotoError(UserError):
    """One file that cannot be used as a photo; the message starts with its name."""


def find_photos(folder: Path) -> list[Path]:
    """The picture files of ``folder``, sorted by name. Raises :class:`UserError` if there are none."""
    if not folder.is_dir():
        raise UserError(f"the photo folder {folder} does not exist: give a folder with JPEG, PNG or WEBP files")
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    foreign = [p.name for p in files if p.suffix.lower() in FOREIGN_SUFFIXES]
    if foreign:
        raise UserError(
            f"{folder}: {_listed(foreign)} cannot be read: export as JPEG or PNG, or take out of the folder"
        )
    photos = [p for p in files if p.suffix.lower() in SUFFIXES]
    if not photos:
        raise UserError(f"no photos in {folder}: put 3 to 10 JPEG, PNG or WEBP files there")
    return photos


def read_photos(folder: Path, workers: int = 0) -> list[Photo]:
    """All photos of a folder. Raises one :class:`UserError` that names every unreadable one."""
    paths = find_photos(folder)
    if workers > 0:
        with ThreadPoolExecutor(workers) as pool:
            outcomes = list(pool.map(_try_read, paths))
    else:
        outcomes = [_try_read(path) for path in paths]
    faults = [str(outcome) for outcome in outcomes if isinstance(outcome, UnreadablePhotoError)]
    if faults:
        raise UserError(f"{folder}: {_listed(faults, '; ')}; replace or remove them")
    photos = [outcome for outcome in outcomes if isinstance(outcome, Photo)]
    _warn_of_duplicates(photos)
    return photos


def read_photo(path: Path) -> Photo:
    """Decode one photo: header and size first, then pixels, EXIF orientation, colours.

    Raises :class:`UnreadablePhotoError` (a :class:`UserError`).
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnreadablePhotoError(f"{path.name} cannot be opened ({error.strerror or error})") from error
    if not content:
        raise UnreadablePhotoError(f"{path.name} is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
                _check_header(path, picture)
                image = to_rgb(_upright(picture), path.name)
    except UnidentifiedImageError as error:
        raise UnreadablePhotoError(f"{path.name} is no JPEG, PNG or WEBP picture") from error
    except Image.DecompressionBombError as error:
        raise UnreadablePhotoError(f"{path.name} has more than {MAX_PIXELS // 10**6} megapixels") from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, UnreadablePhotoError):
            raise
        raise UnreadablePhotoError(f"{path.name} is damaged or truncated") from error
    return Photo(path, image, hashlib.sha256(content).hexdigest())


def to_rgb(image: Image.Image, name: str = "a picture") -> Image.Image:
    """8-bit sRGB of any mode: 16-bit greys scaled, colour profiles applied, transparency put on white."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        if np.asarray(layer)[..., 3].min() < 255:
            log.warning("%s is transparent in places: they become white", name)
        return Image.alpha_composite(Image.new("RGBA", layer.size, (*BACKGROUND, 255)), layer).convert("RGB")
    return _with_profile(image).convert("RGB")


def _eight_bits(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    top = 65535.0 if pixels.max(initial=0) > 255 else 255.0
    return np.clip(np.round(pixels.astype(np.float64) * (255.0 / top)), 0, 255).astype(np.uint8)


def _with_profile(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "CMYK", "L"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image  # a broken or foreign profile is worth less than none
    return converted or image


def _upright(picture: Image.Image) -> Image.Image:
    picture.load()
    try:
        return ImageOps.exif_transpose(picture)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError):
        return picture.copy()  # damaged EXIF: the pixels are still good


def _check_header(path: Path, picture: Image.Image) -> None:
    width, height = picture.size
    short, long = sorted((width, height))
    if width * height > MAX_PIXELS:
        raise UnreadablePhotoError(f"{path.name} is {width}x{height}, more than {MAX_PIXELS // 10**6} megapixels")
    if short < MIN_SIDE:
        raise UnreadablePhotoError(f"{path.name} is {width}x{height}, smaller than {MIN_SIDE} pixels")
    if long > MAX_ASPECT * short:
        raise UnreadablePhotoError(f"{path.name} is {width}x{height}, far too narrow")


def crop_boxes(size: tuple[int, int], count: int, center: bool, generator: np.random.Generator) -> list[Box]:
    """Square boxes of the short side's length: one in the centre, or ``count`` spread along the long side.

    A square photo has one box. The random ones are stratified, so that together they cover the photo.
    """
    width, height = size
    side, room = min(size), abs(width - height)
    spread = [float((i + generator.random()) / count) for i in range(count)]
    places = [0.5] if room == 0 or center else spread
    boxes = []
    for place in places:
        x, y = (place * room, 0.0) if width > height else (0.0, place * room)
        boxes.append((x, y, x + side, y + side))
    return boxes


def square(image: Image.Image, box: Box, resolution: int, resample: Image.Resampling) -> np.ndarray[Any, Any]:
    """The box of the picture as ``[3, resolution, resolution]`` float32 in [-1, 1]."""
    resized = image.resize((resolution, resolution), resample, box=box)
    return np.asarray(resized, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0


def _try_read(path: Path) -> Photo | UnreadablePhotoError:
    try:
        return read_photo(path)
    except UnreadablePhotoError as error:
        return error


def _warn_of_duplicates(photos: Sequence[Photo]) -> None:
    first: dict[str, Path] = {}
    for photo in photos:
        twin = first.setdefault(photo.sha256, photo.path)
        if twin != photo.path:
            log.warning("%s and %s are the same photo: it counts twice", twin.name, photo.path.name)


def _listed(items: Sequence[str], separator: str = ", ", most: int = 5) -> str:
    rest = f"{separator}and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + rest
