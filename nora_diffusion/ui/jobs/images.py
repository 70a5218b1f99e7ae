"""Dropped photos: each as the trainer will see it, or the reason why it will not do; and their captions."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ...data import SourceImage, UnreadableImageError, read_source
from ...data.colors import Color, color
from ...data.report import Row
from ...data.similarity import Duplicate, find_duplicates
from ...data.transforms import Transform
from ...errors import UserError
from ...io.files import write_atomic
from ..engine import Engine

MAX_PHOTOS, MAX_PHOTO_BYTES = 100, 60 * 2**20
MAX_CAPTION_BYTES = 4000


@dataclass(frozen=True)
class Checked:
    """One dropped file: the pictures that the trainer makes of it, or why it cannot be used; and a remark."""

    path: Path
    pictures: tuple[Image.Image, ...] = ()
    fault: str = ""
    remark: str = ""
    caption: str = ""


def check_photos(paths: Sequence[Path], engine: Engine, settings: Mapping[str, Any]) -> list[Checked]:
    """Each file as it will be trained on under ``settings``; headers are checked before anything is decoded.

    Raises :class:`UserError` for too many files.
    """
    from ...training import TrainConfig
    from ...training.data.dataset import transform_of
    from ...training.run.setup import bucket_step

    if len(paths) > MAX_PHOTOS:
        raise UserError(f"{len(paths)} photos are too many: 3 to 10 good ones do, {MAX_PHOTOS} are the limit")
    config = TrainConfig.from_mapping({"resolution": engine.side, **settings})
    read = [_read(path, color(config.background)) for path in paths]
    twins: dict[int, Duplicate] = {}
    for pair in find_duplicates([photo for photo in read if isinstance(photo, SourceImage)]):
        known = twins.get(id(pair.second))
        if known is None or (pair.same_file and not known.same_file):
            twins[id(pair.second)] = pair
    transform, seed = transform_of(config, bucket_step(engine.pipe)), config.seed or 0
    return [_shown(one, twins.get(id(one)), transform, seed) if isinstance(one, SourceImage) else one for one in read]


def _read(path: Path, background: Color) -> SourceImage | Checked:
    try:
        if path.stat().st_size > MAX_PHOTO_BYTES:
            raise UnreadableImageError(f"{path.name} is larger than {MAX_PHOTO_BYTES // 2**20} MiB")
        return read_source(path, background, heic=True)
    except UnreadableImageError as error:
        return Checked(path, fault=str(error))


def _shown(photo: SourceImage, twin: Duplicate | None, transform: Transform, seed: int) -> Checked:
    """The trainer's own crops of a photo; a copy of another one is left out."""
    from ...training.data.dataset import views_of

    if twin is not None and twin.same_file:
        return Checked(photo.path, fault=f"{photo.path.name} is the same photo as {twin.first.path.name}")
    (views,) = views_of(transform, [photo], seed)
    remarks = Row(photo, "", views).all_remarks()
    remarks += [f"looks like {twin.first.path.name}, so it counts twice"] if twin else []
    pictures = tuple(view.apply(photo.image) for view in views)
    return Checked(photo.path, pictures, remark="; ".join(remarks), caption=_caption(photo.path))


def with_captions(photos: Sequence[Path], captions: Sequence[Path], folder: Path) -> tuple[list[Path], list[str]]:
    """Copies of the photos in ``folder``, each with the text file of its name beside it, where the trainer looks.

    Returns their paths, and a sentence for each text file that will not do.
    """
    texts, faults = {}, []
    for file in captions:
        if file.stem not in {photo.stem for photo in photos}:
            faults.append(f"{file.name} belongs to no photo: give it the name of its photo")
        elif file.stat().st_size > MAX_CAPTION_BYTES:
            faults.append(f"{file.name} is longer than {MAX_CAPTION_BYTES} bytes: shorten the caption")
        else:
            try:
                texts[file.stem] = " ".join(file.read_text(encoding="utf-8-sig").split())
            except UnicodeDecodeError:
                faults.append(f"{file.name} is no UTF-8 text: save it as such")
    placed = []
    for number, photo in enumerate(photos):  # a folder each: two photos may have one name
        (folder / str(number)).mkdir()
        placed.append(Path(shutil.copyfile(photo, folder / str(number) / photo.name)))
        if texts.get(photo.stem):
            write_atomic(placed[-1].with_suffix(".txt"), texts[photo.stem])
    return placed, faults


def _caption(photo: Path) -> str:
    file = photo.with_suffix(".txt")
    return file.read_text(encoding="utf-8") if file.is_file() else ""
