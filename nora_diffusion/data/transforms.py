"""From source images to training images: crops, aspect-ratio buckets, flips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

Box = tuple[float, float, float, float]
Shape = tuple[int, int]
Crop = Literal["random", "center", "subject"]
MAX_BUCKET_ASPECT = 2.0


@dataclass(frozen=True)
class View:
    """One training image: the ``box`` of a source image, resized to ``shape`` (width, height), mirrored or not."""

    box: Box
    shape: Shape
    mirrored: bool = False
    resample: int = Image.Resampling.LANCZOS

    def apply(self, image: Image.Image) -> Image.Image:
        """The view of an image."""
        resized = image.resize(self.shape, Image.Resampling(self.resample), box=self.box)
        return ImageOps.mirror(resized) if self.mirrored else resized

    def pixels(self, image: Image.Image) -> np.ndarray[Any, Any]:
        """The view of an image as ``[3, height, width]`` float32 in [-1, 1]."""
        return np.asarray(self.apply(image), dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0

    def region(self, mask: Image.Image, shape: Shape) -> np.ndarray[Any, Any]:
        """The view of a mask, averaged to ``shape`` (width, height): ``[height, width]`` float32 in [0, 1]."""
        small = mask.resize(shape, Image.Resampling.BOX, box=self.box)
        return np.asarray(ImageOps.mirror(small) if self.mirrored else small, dtype=np.float32) / 255


@dataclass(frozen=True)
class Transform:
    """How source images become training images.

    ``shapes``: the possible sizes in pixels; each image gets the one nearest to its aspect ratio and is cropped as
    little as possible. ``crop``: ``random`` (``crops`` positions, spread out), ``center``, or ``subject`` (``crops``
    positions that contain the subject's box; centered on the box if it does not fit).
    """

    shapes: Sequence[Shape]
    crop: Crop = "center"
    crops: int = 1
    flip: bool = False
    resample: int = Image.Resampling.LANCZOS

    def views(self, size: Shape, random: np.random.Generator | None = None, subject: Box | None = None) -> list[View]:
        """All views of an image of ``size``: one if it needs no crop; ``flip`` adds a mirrored copy of each."""
        shape = nearest_shape(size, self.shapes)
        boxes = _boxes(size, shape, self.crop, self.crops, random or np.random.default_rng(0), subject)
        flips = (False, True) if self.flip else (False,)
        return [View(box, shape, mirrored, self.resample) for box in boxes for mirrored in flips]


def nearest_shape(size: Shape, shapes: Sequence[Shape]) -> Shape:
    """The shape whose log aspect ratio is nearest to that of ``size``."""
    own = math.log(size[0] / size[1])
    return min(shapes, key=lambda shape: abs(math.log(shape[0] / shape[1]) - own))


def bucket_shapes(resolution: int, step: int) -> list[Shape]:
    """Shapes from 1:2 to 2:1 of at most ``resolution ** 2`` pixels, with sides that are multiples of ``step``."""
    shapes = {(resolution, resolution)}
    for width in range(step, int(resolution * MAX_BUCKET_ASPECT) + 1, step):
        height = resolution * resolution // width // step * step
        if height and max(width, height) <= MAX_BUCKET_ASPECT * min(width, height):
            shapes |= {(width, height), (height, width)} if width != height else set()
    return sorted(shapes)


def _boxes(
    size: Shape, shape: Shape, crop: Crop, count: int, random: np.random.Generator, subject: Box | None
) -> list[Box]:
    """The largest windows with the aspect ratio of ``shape``; they can only move along one axis."""
    (width, height), (w, h) = size, shape
    wide = width * h >= height * w
    side = (height * w / h, float(height)) if wide else (float(width), width * h / w)
    axis = 0 if wide else 1
    room = size[axis] - side[axis]
    first, last = _allowed(room, side[axis], axis, crop, subject)
    # Stratified, so that the random windows cover the allowed range.
    spread = [float((i + random.random()) / count) for i in range(count)]
    positions = [0.5] if first == last or crop == "center" else spread
    boxes = []
    for position in positions:
        start = first + position * (last - first)
        x, y = (start, 0.0) if axis == 0 else (0.0, start)
        boxes.append((x, y, min(x + side[0], float(width)), min(y + side[1], float(height))))
    return boxes


def _allowed(room: float, side: float, axis: int, crop: Crop, subject: Box | None) -> tuple[float, float]:
    """The first and last possible start of the window along ``axis``."""
    if crop != "subject":
        return 0.0, room
    if subject is None:
        return room / 2, room / 2
    start, end = subject[axis], subject[axis + 2]
    first, last = max(0.0, end - side), min(room, start)
    if first > last:  # the subject is longer than the window
        first = last = min(max((start + end - side) / 2, 0.0), room)
    return first, last
