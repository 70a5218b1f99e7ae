"""Uploaded photos and captions: checked, and cropped as the trainer crops them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ...data import SourceImage, UnreadableImageError, read_source
from ...data.caption_files import caption_files, read_caption
from ...data.colors import Color, color
from ...data.report import Row
from ...data.similarity import Duplicate, find_duplicates
from ...data.transforms import Transform, View
from ...errors import UserError
from ...io.files import sha256, write_atomic
from ..backend import Backend

MAX_IMAGES, MAX_IMAGE_BYTES = 100, 60 * 2**20
MAX_CAPTION_BYTES = 4000
PREVIEW_SIDE = 256


@dataclass(frozen=True)
class CheckedImage:
    """An uploaded file: the crops that the trainer makes of it and a remark, or the ``error`` why it is left out."""

    path: Path
    crops: tuple[Image.Image, ...] = ()
    error: str = ""
    remark: str = ""
    caption: str = ""


def check_images(paths: Sequence[Path], engine: Backend, settings: Mapping[str, Any]) -> list[CheckedImage]:
    """Check each file and crop it as a training with these settings does. Headers are checked before decoding.

    Only small copies are kept, so that memory holds one photo at a time. Raises :class:`UserError` for too many files.
    """
    from ...training import TrainConfig
    from ...training.data.dataset import transform_of
    from ...training.step.denoiser import bucket_multiple

    _check_count(paths)
    config = TrainConfig.from_mapping({"resolution": engine.side, **settings})
    transform = transform_of(config, config.resolution or engine.side, bucket_multiple(engine.pipe))
    read: list[SourceImage] = []
    checked: list[CheckedImage] = []
    for path in paths:
        try:
            image = _read(path, color(config.background))
        except UnreadableImageError as error:
            checked.append(CheckedImage(path, error=str(error)))
            continue
        checked.append(_cropped(image, transform, config.seed or 0))
        read.append(image)
    duplicates: dict[int, Duplicate] = {}
    for pair in find_duplicates(read):
        known = duplicates.get(id(pair.second))
        if known is None or (pair.same_file and not known.same_file):
            duplicates[id(pair.second)] = pair
    found = iter(read)
    return [image if image.error else _noted(image, duplicates.get(id(next(found)))) for image in checked]


def distinct(paths: Sequence[Path]) -> list[Path]:
    """The files that :func:`check_images` reads: not too large, and no copies of another one."""
    _check_count(paths)
    fitting = [path for path in paths if path.stat().st_size <= MAX_IMAGE_BYTES]
    return list({sha256(path): path for path in reversed(fitting)}.values())[::-1]


def _check_count(paths: Sequence[Path]) -> None:
    if len(paths) > MAX_IMAGES:
        raise UserError(f"{len(paths)} photos are too many: 3 to 10 good ones are enough, the limit is {MAX_IMAGES}")


def _read(path: Path, background: Color) -> SourceImage:
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise UnreadableImageError(f"{path.name} is larger than {MAX_IMAGE_BYTES // 2**20} MiB")
    return read_source(path, background)


def _cropped(image: SourceImage, transform: Transform, seed: int) -> CheckedImage:
    """The trainer's crops of an image, at most ``PREVIEW_SIDE`` pixels large."""
    from ...training.data.dataset import views_of

    (views,) = views_of(transform, [image], seed)
    remarks = Row(image, "", views).all_remarks()
    pixels = image.image
    crops = tuple(_preview(view).apply(pixels) for view in views)
    return CheckedImage(image.path, crops, remark="; ".join(remarks), caption=_caption(image.path))


def _preview(view: View) -> View:
    scale = min(1.0, PREVIEW_SIDE / max(view.shape))
    width, height = (max(1, round(side * scale)) for side in view.shape)
    return replace(view, shape=(width, height))


def _noted(image: CheckedImage, duplicate: Duplicate | None) -> CheckedImage:
    """The image with a remark if it looks like another one; a byte-identical copy of another image is left out."""
    if duplicate is None:
        return image
    if duplicate.same_file:
        return CheckedImage(image.path, error=f"{image.path.name} is the same photo as {duplicate.first.path.name}")
    twice = f"looks like {duplicate.first.path.name}, so it counts twice"
    return replace(image, remark="; ".join(filter(None, (image.remark, twice))))


def with_captions(images: Sequence[Path], captions: Sequence[Path], folder: Path) -> tuple[list[Path], list[str]]:
    """Copy the images into ``folder``, each with its caption file next to it, where the trainer looks for it.

    Caption files are matched to images as in the trainer. Returns the paths of the copies, and an error for each
    unusable caption.
    """
    beside = caption_files(images, captions)
    used = {file for files in beside.values() for file in files}
    errors = [
        f"{file.name} belongs to no photo: give it the name of its photo" for file in captions if file not in used
    ]
    texts = {}
    for image, (file, *others) in beside.items():
        errors += [f"{other.name} is left out: {file.name} is already the caption of {image.name}" for other in others]
        if file.stat().st_size > MAX_CAPTION_BYTES:
            errors.append(f"{file.name} is longer than {MAX_CAPTION_BYTES} bytes: shorten the caption")
            continue
        try:
            texts[image] = read_caption(file)
        except UserError:
            errors.append(f"{file.name} is not UTF-8 text: save it as UTF-8")
    copies = []
    for number, image in enumerate(images):  # a folder each: two images may have the same name
        (folder / str(number)).mkdir()
        copies.append(Path(shutil.copyfile(image, folder / str(number) / image.name)))
        if texts.get(image):
            write_atomic(copies[-1].with_suffix(".txt"), texts[image])
    return copies, list(dict.fromkeys(errors))


def _caption(image: Path) -> str:
    file = image.with_suffix(".txt")
    return file.read_text(encoding="utf-8") if file.is_file() else ""
