"""Photos of a subject: found, checked before they are decoded, made upright and RGB."""

from __future__ import annotations

import functools
import hashlib
import logging
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import UserError
from ..io.images import MAX_PIXELS
from .colors import WHITE, Color, to_rgb
from .formats import is_picture, open_picture, refusal, size_of

log = logging.getLogger(__name__)

MIN_SIDE = 16
MAX_ASPECT = 8.0
ORIENTATION = 0x0112


@dataclass(frozen=True)
class SourceImage:
    """One decoded photo: an upright RGB picture and the SHA-256 of the file it came from.

    ``alpha`` is its transparency (``L``) where it has some; ``remarks`` say what was done to it; ``mask`` (``L``) shows
    the subject where somebody asked for it (:mod:`.masks`).
    """

    path: Path
    image: Image.Image
    sha256: str
    alpha: Image.Image | None = None
    remarks: tuple[str, ...] = ()
    mask: Image.Image | None = None


@dataclass(frozen=True)
class Reject:
    """A file that cannot be used as a photo, and why: a sentence that starts with its name."""

    path: Path
    reason: str


class UnreadableImageError(UserError):
    """One file that cannot be used as a photo; the message starts with its name."""


def find_images(folder: Path) -> list[Path]:
    """The picture files of ``folder``, sorted by name. Raises :class:`UserError` if there are none.

    A file counts that has a picture's name or a picture's header: a photo without a suffix is one.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file: give the folder that it is in")
    if not folder.is_dir():
        raise UserError(f"the photo folder {folder} does not exist: give a folder with JPEG, PNG or WEBP files")
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    photos = [p for p in files if is_picture(p)]
    if not photos:
        raise UserError(f"no photos in {folder}: put 3 to 10 JPEG, PNG or WEBP files there")
    return photos


def survey(folder: Path, workers: int = 0, background: Color = WHITE) -> tuple[list[SourceImage], list[Reject]]:
    """All photos of a folder (HEIC too, with its extra), and the files that cannot be used."""
    paths = find_images(folder)
    read = functools.partial(_try_read, background=background)
    if workers > 0:
        with ThreadPoolExecutor(workers) as pool:
            outcomes = list(pool.map(read, paths))
    else:
        outcomes = [read(path) for path in paths]
    photos = [outcome for outcome in outcomes if isinstance(outcome, SourceImage)]
    return photos, [outcome for outcome in outcomes if isinstance(outcome, Reject)]


def read_images(folder: Path, workers: int = 0, background: Color = WHITE) -> list[SourceImage]:
    """All photos of a folder. Raises one :class:`UserError` that names every unreadable one."""
    photos, rejects = survey(folder, workers, background)
    if rejects:
        raise UserError(f"{folder}: {listed([reject.reason for reject in rejects], '; ')}; replace or remove them")
    return photos


def read_source(path: Path, background: Color = WHITE, heic: bool = False) -> SourceImage:
    """Decode one photo: header and size first, then pixels, EXIF orientation, colors.

    ``heic`` allows HEIC where the extra is installed. Raises :class:`UnreadableImageError` (a :class:`UserError`).
    """
    content = _content(path)
    refused = refusal(content, heic)
    if refused:
        raise UnreadableImageError(f"{path.name} {refused}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            _check_size(path, size_of(content))
            with open_picture(content) as picture:
                return _decoded(path, picture, hashlib.sha256(content).hexdigest(), background)
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"{path.name} is damaged or truncated") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"{path.name} has more than {MAX_PIXELS // 10**6} megapixels") from error
    except (OSError, SyntaxError, ValueError, RuntimeError, EOFError) as error:
        if isinstance(error, UnreadableImageError):
            raise
        raise UnreadableImageError(f"{path.name} is damaged or truncated") from error


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnreadableImageError(f"{path.name} cannot be opened ({error.strerror or error})") from error
    if not content:
        raise UnreadableImageError(f"{path.name} is empty")
    return content


def _decoded(path: Path, picture: Image.Image, sha256: str, background: Color) -> SourceImage:
    mode, frames = picture.mode, getattr(picture, "n_frames", 1)
    upright, turned = _upright(picture)
    image, alpha, sound = to_rgb(upright, background)
    remarks = ["turned as its EXIF says"] if turned else []
    if alpha is not None:
        place = "#{:02x}{:02x}{:02x}".format(*background)
        remarks.append(f"transparent in places, which become {'white' if background == WHITE else place}")
        log.warning("%s is %s", path.name, remarks[-1])
    if not sound:
        remarks.append("its color profile cannot be used: its colors are taken as sRGB")
    if mode not in ("RGB", "RGBA"):
        remarks.append(f"converted from {mode} to RGB")
    if frames > 1 and picture.format != "MPO":
        remarks.append(f"the first of {frames} frames")
    return SourceImage(path, image, sha256, alpha, tuple(remarks))


def _upright(picture: Image.Image) -> tuple[Image.Image, bool]:
    """The picture as it is to be seen, and whether that took a turn."""
    picture.load()
    try:
        turned = picture.getexif().get(ORIENTATION, 1) in range(2, 9)
        return ImageOps.exif_transpose(picture), turned
    except (OSError, SyntaxError, ValueError, KeyError, TypeError):
        return picture.copy(), False  # damaged EXIF: the pixels are still good


def _check_size(path: Path, size: tuple[int, int]) -> None:
    width, height = size
    short, long = sorted(size)
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(f"{path.name} is {width}x{height}, more than {MAX_PIXELS // 10**6} megapixels")
    if short < MIN_SIDE:
        raise UnreadableImageError(f"{path.name} is {width}x{height}, smaller than {MIN_SIDE} pixels")
    if long > MAX_ASPECT * short:
        raise UnreadableImageError(f"{path.name} is {width}x{height}, far too narrow")


def _try_read(path: Path, background: Color) -> SourceImage | Reject:
    try:
        return read_source(path, background, heic=True)
    except UnreadableImageError as error:
        return Reject(path, str(error))


def listed(items: Sequence[str], separator: str = ", ", most: int = 5) -> str:
    """The first ``most`` items in a row, and how many more there are."""
    rest = f"{separator}and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + rest
