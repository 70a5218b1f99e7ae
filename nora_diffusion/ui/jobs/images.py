"""Uploaded photos and captions: checked, and cropped as the trainer crops them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ...data import SourceImage, UnreadableImageError, read_source
from ...data.caption_files import caption_files, read_caption
from ...data.colors import Color, color
from ...data.report import Row
from ...data.similarity import Duplicate, find_duplicates
from ...data.transforms import Transform
from ...errors import UserError
from ...io.files import write_atomic
from ..engine import Engine

MAX_IMAGES, MAX_IMAGE_BYTES = 100, 60 * 2**20
MAX_CAPTION_BYTES = 4000


@dataclass(frozen=True)
class CheckedImage:
    """An uploaded file: the crops that the trainer makes of it and a remark, or the ``error`` why it is left out."""

    path: Path
    crops: tuple[Image.Image, ...] = ()
    error: str = ""
    remark: str = ""
    caption: str = ""


def check_images(paths: Sequence[Path], engine: Engine, settings: Mapping[str, Any]) -> list[CheckedImage]:
    """Check each file and crop it as a training with these settings does. Headers are checked before decoding.

    Raises :class:`UserError` for too many files.
    """
    from ...training import TrainConfig
    from ...training.data.dataset import transform_of
    from ...training.step.denoiser import bucket_multiple

    if len(paths) > MAX_IMAGES:
        raise UserError(f"{len(paths)} photos are too many: 3 to 10 good ones are enough, the limit is {MAX_IMAGES}")
    config = TrainConfig.from_mapping({"resolution": engine.side, **settings})
    images = [_read(path, color(config.background)) for path in paths]
    duplicates: dict[int, Duplicate] = {}
    for pair in find_duplicates([image for image in images if isinstance(image, SourceImage)]):
        known = duplicates.get(id(pair.second))
        if known is None or (pair.same_file and not known.same_file):
            duplicates[id(pair.second)] = pair
    transform = transform_of(config, config.resolution or engine.side, bucket_multiple(engine.pipe))
    seed = config.seed or 0
    return [
        _cropped(image, duplicates.get(id(image)), transform, seed) if isinstance(image, SourceImage) else image
        for image in images
    ]


def _read(path: Path, background: Color) -> SourceImage | CheckedImage:
    try:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise UnreadableImageError(f"{path.name} is larger than {MAX_IMAGE_BYTES // 2**20} MiB")
        return read_source(path, background)
    except UnreadableImageError as error:
        return CheckedImage(path, error=str(error))


def _cropped(image: SourceImage, duplicate: Duplicate | None, transform: Transform, seed: int) -> CheckedImage:
    """The trainer's crops of an image; a byte-identical copy of another image is left out."""
    from ...training.data.dataset import views_of

    if duplicate is not None and duplicate.same_file:
        return CheckedImage(image.path, error=f"{image.path.name} is the same photo as {duplicate.first.path.name}")
    (views,) = views_of(transform, [image], seed)
    remarks = Row(image, "", views).all_remarks()
    remarks += [f"looks like {duplicate.first.path.name}, so it counts twice"] if duplicate else []
    crops = tuple(view.apply(image.image) for view in views)
    return CheckedImage(image.path, crops, remark="; ".join(remarks), caption=_caption(image.path))


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
