"""Read the images of a folder: check each before decoding, apply its EXIF orientation, convert it to RGB.

Pixels are decoded when they are needed and not kept, so that a folder of any size fits into memory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import math
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from PIL import Image, ImageOps

from ..errors import UserError, reason
from ..io.files import is_special
from .colors import WHITE, Color, to_rgb
from .fingerprint import Fingerprint
from .folder import Reject, enumerated, find_images
from .formats import (
    MAX_DECODER_BYTES,
    MAX_STORED_PIXELS,
    decoder_bytes,
    missing_share,
    open_image,
    reduced,
    refusal,
    size_of,
)

log = logging.getLogger(__name__)

MIN_SIDE = 16
MAX_ASPECT = 8.0
MAX_MISSING = 0.04
"""A truncated JPEG is used if at most this share of its rows is missing."""
MAX_FILE_BYTES = 512 * 2**20
ORIENTATION = 0x0112
BYTES_PER_PIXEL = 18
"""Of a decoded image while it is converted: RGB in four bytes, in up to four copies, and its alpha channel."""
MAX_BLANK = 8
"""Levels of 255 by which the pixels of a blank image differ at most."""


@dataclass(frozen=True)
class Decoded:
    """The pixels of an image file: upright, RGB. ``alpha``: its alpha channel (mode ``L``), if it is not opaque."""

    image: Image.Image
    alpha: Image.Image | None
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class SourceImage:
    """A checked image file. It holds no pixels: a decoded photo of 12 megapixels has 46 MiB.

    ``size``: width and height of the decoded image. ``sha256``: hash of the file. ``is_transparent``: whether it has an
    alpha channel. ``remarks``: what was changed. ``mask``: the subject, after :func:`.masks.with_masks`. ``is_blank``:
    whether it is of a single color, as failed exports and black images of a VAE in fp16 are. ``memory``: upper bound of
    the bytes that decoding it takes, for the file, its decoder, which may see a larger image, and the conversion.
    """

    path: Path
    size: tuple[int, int]
    sha256: str
    fingerprint: Fingerprint = field(compare=False)
    is_transparent: bool = False
    remarks: tuple[str, ...] = ()
    background: Color = WHITE
    mask: Mask | None = None
    is_blank: bool = False
    memory: int = 0

    def decode(self) -> Decoded:
        """Decode the file again. Raises :class:`UnreadableImageError` if it is not the file that was checked."""
        content = _content(self.path)
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise UnreadableImageError(f"{self.path.name} was changed while it was in use: start again")
        with _reading(self.path):
            return _decode(self.path, content, self.background)

    @property
    def image(self) -> Image.Image:
        """The pixels, decoded at each access."""
        return self.decode().image

    @property
    def alpha(self) -> Image.Image | None:
        """The alpha channel, decoded at each access; ``None`` if the image is opaque."""
        return self.decode().alpha if self.is_transparent else None


@dataclass(frozen=True)
class Mask:
    """A subject mask without its pixels. ``file``: its image; ``None``: the alpha channel of the photo.

    ``box``: left, top, right and bottom of the subject. ``coverage``: its share of the photo.
    """

    file: SourceImage | None
    box: tuple[float, float, float, float]
    sha256: str
    coverage: float


class Pixels(Sequence[Image.Image]):
    """The pixels of several images, decoded at each access, so that they are not in memory together."""

    def __init__(self, sources: Sequence[SourceImage]) -> None:
        self.sources = sources

    def __len__(self) -> int:
        return len(self.sources)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Pixels: ...
    def __getitem__(self, index: int | slice) -> Image.Image | Pixels:
        return Pixels(self.sources[index]) if isinstance(index, slice) else self.sources[index].image


class UnreadableImageError(UserError):
    """A file that cannot be used; the message starts with its name."""


def survey(folder: Path, workers: int = 0, background: Color = WHITE) -> tuple[list[SourceImage], list[Reject]]:
    """All images of a folder and the files that cannot be used."""
    return survey_files(find_images(folder), workers, background)


def survey_files(
    paths: Sequence[Path], workers: int = 0, background: Color = WHITE
) -> tuple[list[SourceImage], list[Reject]]:
    """The images among files, and the files that cannot be used."""
    read = functools.partial(_try_read, background=background)
    if workers > 0:
        with ThreadPoolExecutor(_that_fit(workers)) as pool:
            results = list(pool.map(read, paths))
    else:
        results = [read(path) for path in paths]
    images = [result for result in results if isinstance(result, SourceImage)]
    return images, [result for result in results if isinstance(result, Reject)]


def _that_fit(workers: int) -> int:
    """As many workers as there is memory for, if each decodes one of the largest images at once."""
    import psutil  # type: ignore[import-untyped, unused-ignore]

    return max(1, min(workers, int(psutil.virtual_memory().available) // (2 * MAX_DECODER_BYTES)))


def read_images(folder: Path, workers: int = 0, background: Color = WHITE) -> list[SourceImage]:
    """All images of a folder. Raises one :class:`UserError` that names the unreadable files."""
    images, rejects = survey(folder, workers, background)
    if rejects:
        raise UserError(f"{folder}: {enumerated([reject.reason for reject in rejects], '; ')}; replace or remove them")
    return images


def read_source(path: Path, background: Color = WHITE) -> SourceImage:
    """Check one image file: header, size, and that its pixels can be decoded. The pixels are not kept.

    Raises :class:`UnreadableImageError` (a :class:`UserError`).
    """
    content = _content(path)
    refused = refusal(content)
    if refused:
        raise UnreadableImageError(f"{path.name} {refused}")
    with _reading(path):
        size = size_of(content)
        needed = decoder_bytes(content, size)
        _check_size(path, size, needed)
        missing = missing_share(content)
        if missing > MAX_MISSING:
            raise UnreadableImageError(f"{path.name} is cut off: the lower {missing:.0%} of the image is missing")
        decoded = _decode(path, content, background)
    if decoded.alpha is not None:
        log.warning("%s is partly transparent, filled with %s", path.name, _name(background))
    return SourceImage(
        path,
        decoded.image.size,
        hashlib.sha256(content).hexdigest(),
        Fingerprint.of(decoded.image),
        decoded.alpha is not None,
        (*decoded.remarks, *(["its last rows are damaged"] if missing else [])),
        background,
        is_blank=_is_blank(decoded.image),
        memory=2 * len(content) + max(needed * 6 // 5, BYTES_PER_PIXEL * math.prod(decoded.image.size)),
    )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the errors of Pillow's decoders into :class:`UnreadableImageError`."""
    try:
        yield
    except UnreadableImageError:
        raise
    except MemoryError as error:
        raise UnreadableImageError(f"{path.name} needs more memory than there is: save a smaller copy") from error
    except (OSError, SyntaxError, ValueError, RuntimeError, EOFError, LookupError, TypeError, struct.error) as error:
        raise UnreadableImageError(f"{path.name} is damaged or truncated") from error


def _content(path: Path) -> bytes:
    try:
        if is_special(path):
            raise UnreadableImageError(f"{path.name} is a pipe or a device, not a file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UnreadableImageError(f"{path.name} is larger than {MAX_FILE_BYTES // 2**20} MiB: save a smaller copy")
        content = path.read_bytes()
    except OSError as error:
        raise UnreadableImageError(f"{path.name} cannot be opened ({reason(error)})") from error
    if not content:
        raise UnreadableImageError(f"{path.name} is empty")
    return content


def _decode(path: Path, content: bytes, background: Color) -> Decoded:
    with open_image(content) as opened:
        mode, frames = opened.mode, 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
        upright, rotated = _upright(opened)
    image, alpha, color_remarks = to_rgb(reduced(upright), background)
    if alpha is not None and alpha.getextrema() == (0, 0):
        raise UnreadableImageError(f"{path.name} is wholly transparent: nothing of it is visible")
    remarks = ["rotated by its EXIF orientation"] if rotated else []
    size = size_of(content)
    if math.prod(image.size) < math.prod(size):
        remarks.append("{}x{}, reduced to {}x{}".format(*size, *image.size))
    if alpha is not None:
        remarks.append(f"partly transparent, filled with {_name(background)}")
    remarks += color_remarks
    if mode not in ("RGB", "RGBA"):
        remarks.append(f"converted from {mode} to RGB")
    if frames > 1:
        remarks.append(f"the first of {frames} frames")
    return Decoded(image, alpha, tuple(remarks))


def _name(color: Color) -> str:
    return "white" if color == WHITE else "#{:02x}{:02x}{:02x}".format(*color)


def _is_blank(image: Image.Image) -> bool:
    bands: Any = image.getextrema()
    return all(high - low <= MAX_BLANK for low, high in bands)


def _upright(image: Image.Image) -> tuple[Image.Image, bool]:
    """The image with its EXIF orientation applied, and whether that changed it."""
    image.load()
    try:
        rotated = image.getexif().get(ORIENTATION, 1) in range(2, 9)
        return ImageOps.exif_transpose(image) if rotated else image, rotated  # no copy of a large image
    except (OSError, SyntaxError, ValueError, KeyError, TypeError):
        return image, False  # damaged EXIF data; the pixels are fine


def _check_size(path: Path, size: tuple[int, int], needed: int) -> None:
    """``needed``: bytes of memory for decoding."""
    width, height = size
    short, long = sorted(size)
    if width * height > MAX_STORED_PIXELS or needed > MAX_DECODER_BYTES:
        raise UnreadableImageError(
            f"{path.name} is {width}x{height}: {width * height / 1e6:.0f} megapixels need too much memory, so save a "
            "smaller copy"
        )
    if short < MIN_SIDE:
        raise UnreadableImageError(f"{path.name} is {width}x{height}, smaller than {MIN_SIDE} pixels")
    if long > MAX_ASPECT * short:
        raise UnreadableImageError(f"{path.name} is {width}x{height}, too narrow: its sides differ by more than 8 to 1")


def _try_read(path: Path, background: Color) -> SourceImage | Reject:
    try:
        return read_source(path, background)
    except UnreadableImageError as error:
        return Reject(path, str(error))
