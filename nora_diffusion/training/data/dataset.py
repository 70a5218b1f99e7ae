"""The training pictures of a run, as its settings ask for them, and the report on them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ...data.caption_variants import CaptionVariants, tag_orders
from ...data.images import SourceImage
from ...data.masks import subject_box
from ...data.report import DataReport, Row
from ...data.similarity import find_duplicates
from ...data.transforms import Transform, View, bucket_shapes
from ..settings.config import TrainConfig
from ..settings.resolved import ResolvedConfig
from ..step.randomness import derive, generator
from .subject import Subject

log = logging.getLogger(__name__)


def transform_of(config: TrainConfig, resolution: int, step: int) -> Transform:
    """How ``config`` crops and resizes images to ``resolution``. ``step``: sides of buckets are multiples of it."""
    shapes = bucket_shapes(resolution, step) if config.aspect_buckets else [(resolution, resolution)]
    crop = "center" if config.center_crop else config.crop
    # torchvision has two of them; Pillow's is the exact one.
    resample = Image.Resampling[config.image_interpolation_mode.removesuffix("_exact").upper()]
    return Transform(shapes, crop, config.crops_per_image, config.random_flip, resample)


def views_of(transform: Transform, photos: Sequence[SourceImage], seed: int) -> list[list[View]]:
    """The training pictures of each photo: a function of the photo and the seed alone."""
    return [
        transform.views(
            photo.image.size,
            np.random.default_rng(derive(seed, "crops", photo.sha256)),
            None if photo.mask is None else subject_box(photo.mask),
        )
        for photo in photos
    ]


def class_views(
    transform: Transform, photos: Sequence[SourceImage], seed: int, like: Sequence[Sequence[View]]
) -> list[list[View]]:
    """Training pictures of the class pictures, in every shape that the photos have, to share a batch with them."""
    shapes = sorted({view.shape for views in like for view in views})
    plain = replace(transform, crop="random" if transform.crop == "subject" else transform.crop)
    by_shape = [views_of(replace(plain, shapes=[shape]), photos, seed) for shape in shapes]
    return [[view for views in each for view in views] for each in zip(*by_shape, strict=True)]


def caption_variants(config: ResolvedConfig, captions: Sequence[str]) -> CaptionVariants:
    """The captions that each image may be drawn with."""
    if not config.shuffle_tags:
        return CaptionVariants([[caption] for caption in captions], config.caption_dropout)
    sources = [generator(config.seed, "tags", caption) for caption in captions]
    texts = [
        tag_orders(caption, config.shuffle_tags, config.keep_tokens, source)
        for caption, source in zip(captions, sources, strict=True)
    ]
    return CaptionVariants(texts, config.caption_dropout)


def report_data(folder: Path, subject: Subject, views: Sequence[Sequence[View]]) -> Path:
    """Write the data report; small photos and duplicates are warned of. Returns the path of the page."""
    rows = [
        Row(photo, caption, own) for photo, caption, own in zip(subject.images, subject.captions, views, strict=True)
    ]
    small = [f"{row.source.path.name} ({row.enlargement:.1f} times)" for row in rows if row.enlargement > 1.05]
    if small:
        log.warning("%s: smaller than the resolution, so enlarged", ", ".join(small[:5]))
    twins = find_duplicates(subject.images)
    for pair in twins[:5]:
        log.warning("%s: it counts twice", pair)
    return DataReport(rows, subject.rejects, twins, subject.held_out).write(folder)
