"""An image to start from: which part of it is generated anew, at which size, and how the result is put back.

Needs no torch, so that files and settings are checked at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image, ImageFilter

from ..data.images import SourceImage, UnreadableImageError, read_source
from ..data.masks import subject_box
from ..errors import UserError
from .settings import Sampling, check_range, check_strength

Box = tuple[int, int, int, int]
Size = tuple[int, int]

MAX_ASPECT_ERROR = 0.02
MAX_PADDING = 4096
FEATHER = 1 / 128
"""Radius of the soft border of a mask, as a share of the longer side."""


@dataclass(frozen=True)
class StartImage:
    """An image to start from, in place of noise.

    ``strength``: the share of the steps that are made, so how much changes, up to 1. ``mask``: an image of the same
    shape, white where something new is to appear, black where everything stays; of an image with transparency, its
    opaque part. ``padding``: with a mask, generate only the box around its white part, with so many pixels of the image
    around it, at the full size of the base (``None``: the whole image).
    """

    path: Path
    strength: float = 0.6
    mask: Path | None = None
    padding: int | None = None

    def check(self, sampling: Sampling) -> None:
        """Read both files. Raises :class:`UserError` for files and settings that cannot be used."""
        check_strength("strength", self.strength, sampling.steps)
        size = self.source.size
        if self.mask is None:
            if self.padding is not None:
                raise UserError("the padding is that of a mask, and there is none: give a mask too")
            return
        if self.padding is not None:
            check_range("mask padding", self.padding, 0, MAX_PADDING)
        if sampling.hires_scale > 1:
            raise UserError("a second pass would change the image outside of the mask: leave out one of them")
        assert self.mask_source
        own = self.mask_source.size
        if abs(own[0] * size[1] / (own[1] * size[0]) - 1) > MAX_ASPECT_ERROR:
            raise UserError(
                f"the mask {self.mask.name} is {own[0]}x{own[1]}, the image {size[0]}x{size[1]}: make a mask of the "
                "image's size"
            )
        _ = self.region

    @cached_property
    def source(self) -> SourceImage:
        """The image file, checked. Raises :class:`UserError`."""
        return _read(self.path, "image")

    @cached_property
    def mask_source(self) -> SourceImage | None:
        """The mask's file, checked. Raises :class:`UserError`."""
        return None if self.mask is None else _read(self.mask, "mask")

    @cached_property
    def pixels(self) -> tuple[Image.Image, Image.Image | None]:
        """The image (RGB) and its mask (``L``), which has the same size."""
        image = self.source.image
        if self.mask_source is None:
            return image, None
        decoded = self.mask_source.decode()
        mask = decoded.alpha or decoded.image.convert("L")
        return image, mask.resize(image.size, Image.Resampling.BILINEAR)

    @cached_property
    def region(self) -> Box:
        """The box around the white part of the mask. Raises :class:`UserError` if nothing is white."""
        mask = self.pixels[1]
        assert mask is not None
        box = subject_box(mask)
        if box is None:
            raise UserError(f"the mask {self.mask} has nothing white: paint what shall be generated white")
        left, top, right, bottom = (int(edge) for edge in box)
        return left, top, right, bottom

    def frame(self, side: int, multiple: int, width: int | None = None, height: int | None = None) -> Frame:
        """What a base generates of it. ``side``: the base's own size; ``multiple``: that sides must have.

        Without a width and a height, the frame has the shape of the image and the area of a square with that side.
        """
        image, mask = self.pixels
        if mask is not None and self.padding is not None:
            target = (width or side, height or side)
            box = _grown(_padded(self.region, self.padding, image.size), target, image.size)
            return Frame(image, mask, box, _of_area(target[0] * target[1], box, multiple), inside=True)
        size = _size(image.size, side, multiple, width, height)
        return Frame(image, mask, _centered(image.size, size), size)

    def settings(self) -> dict[str, object]:
        """What an image's file records of it."""
        found: dict[str, object] = {"image": self.path.name, "sha256": self.source.sha256, "strength": self.strength}
        if self.mask_source is not None:
            found |= {"mask": self.mask_source.path.name, "mask_sha256": self.mask_source.sha256}
        return found if self.padding is None else found | {"padding": self.padding}


@dataclass(frozen=True)
class Frame:
    """The part ``box`` of an image, generated at ``size``; ``inside``: the result is put into the whole image."""

    whole: Image.Image
    whole_mask: Image.Image | None
    box: Box
    size: Size
    inside: bool = False

    @cached_property
    def image(self) -> Image.Image:
        """The part of the image, at the size that is generated."""
        return self.whole.resize(self.size, Image.Resampling.LANCZOS, box=self.box)

    @cached_property
    def mask(self) -> Image.Image | None:
        """The part of the mask, at the same size."""
        return None if self.whole_mask is None else self.whole_mask.resize(self.size, box=self.box)

    def finished(self, made: Image.Image) -> Image.Image:
        """The result: with a mask, everything outside of its soft border is the image's own."""
        if self.mask is None:
            return made
        made = made.resize(self.size)  # Flux rounds sizes
        soft = self.mask.filter(ImageFilter.GaussianBlur(max(self.size) * FEATHER))
        if not self.inside:
            return Image.composite(made, self.image, soft)
        shape = (self.box[2] - self.box[0], self.box[3] - self.box[1])
        found = self.whole.copy()
        found.paste(made.resize(shape, Image.Resampling.LANCZOS), self.box[:2], soft.resize(shape))
        return found


def _read(path: Path, kind: str) -> SourceImage:
    try:
        return read_source(path)
    except UnreadableImageError as error:
        raise UserError(f"the {kind} {path} cannot be used ({error}): choose another one") from error


def _size(size: Size, side: int, multiple: int, width: int | None, height: int | None) -> Size:
    """The given sides; a missing one follows from the shape of the image, both from the area of the base's square."""
    if width and height:
        return width, height
    if width:
        return width, _rounded(width * size[1] / size[0], multiple)
    if height:
        return _rounded(height * size[0] / size[1], multiple), height
    return _of_area(side * side, (0, 0, *size), multiple)


def _of_area(area: int, box: Box, multiple: int) -> Size:
    """The size of this area with the shape of a box."""
    width, height = box[2] - box[0], box[3] - box[1]
    scale = math.sqrt(area / (width * height))
    return _rounded(width * scale, multiple), _rounded(height * scale, multiple)


def _rounded(side: float, multiple: int) -> int:
    return max(1, round(side / multiple)) * multiple


def _centered(size: Size, shape: Size) -> Box:
    """The largest box in the middle of an image with the shape of ``shape``."""
    scale = min(size[0] / shape[0], size[1] / shape[1])
    width, height = max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return left, top, left + width, top + height


def _padded(box: Box, padding: int, size: Size) -> Box:
    left, top, right, bottom = box
    return (
        max(0, left - padding), max(0, top - padding), min(size[0], right + padding), min(size[1], bottom + padding)
    )  # fmt: skip


def _grown(box: Box, shape: Size, size: Size) -> Box:
    """The smallest box around ``box`` with the shape of ``shape``, as far as the image has room for it."""
    width, height = box[2] - box[0], box[3] - box[1]
    scale = max(width / shape[0], height / shape[1])
    left, right = _stretched(box[0], box[2], round(shape[0] * scale), size[0])
    top, bottom = _stretched(box[1], box[3], round(shape[1] * scale), size[1])
    return left, top, right, bottom


def _stretched(low: int, high: int, length: int, limit: int) -> tuple[int, int]:
    """An interval of ``length`` around another one, moved into ``0 .. limit``, or all of it."""
    length = min(max(length, high - low), limit)
    start = min(max(0, (low + high - length) // 2), limit - length)
    return start, start + length
