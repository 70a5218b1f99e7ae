"""Training images of a run, and the data report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ...data.images import SourceImage
from ...data.report import DataReport, Row
from ...data.similarity import find_duplicates
from ...data.transforms import Transform, View, bucket_shapes
from ..settings.config import TrainConfig
from ..step.seeds import derive
from .subject import Subject

log = logging.getLogger(__name__)


def transform_of(config: TrainConfig, resolution: int, step: int) -> Transform:
    """Crops, buckets and resizing of ``config``. Sides of buckets are multiples of ``step``."""
    shapes = bucket_shapes(resolution, step) if config.aspect_buckets else [(resolution, resolution)]
    crop = "center" if config.center_crop else config.crop
    # Pillow has only torchvision's exact variant of nearest.
    resample = Image.Resampling[config.image_interpolation_mode.removesuffix("_exact").upper()]
    return Transform(shapes, crop, config.crops_per_image, config.random_flip, resample)


def views_of(transform: Transform, images: Sequence[SourceImage], seed: int) -> list[list[View]]:
    """Views of each image; they depend only on the image and the seed."""
    return [
        transform.views(
            image.size,
            np.random.default_rng(derive(seed, "crops", image.sha256)),
            None if image.mask is None else image.mask.box,
        )
        for image in images
    ]


def class_views(
    transform: Transform, images: Sequence[SourceImage], seed: int, instance_views: Sequence[Sequence[View]]
) -> list[list[View]]:
    """Views of class images, in every shape of ``instance_views``, so that they can share a batch."""
    shapes = sorted({view.shape for views in instance_views for view in views})
    plain = replace(transform, crop="random" if transform.crop == "subject" else transform.crop)
    by_shape = [views_of(replace(plain, shapes=[shape]), images, seed) for shape in shapes]
    return [[view for views in each for view in views] for each in zip(*by_shape, strict=True)]


def report_data(folder: Path, subject: Subject, views: Sequence[Sequence[View]]) -> Path:
    """Write the data report; warn about small images and duplicates. Returns the path of the HTML page."""
    rows = [
        Row(image, caption, own) for image, caption, own in zip(subject.images, subject.captions, views, strict=True)
    ]
    small = [f"{row.source.path.name} ({row.enlargement:.1f} times)" for row in rows if row.enlargement > 1.05]
    if small:
        log.warning("%s: smaller than the resolution, so it is enlarged", ", ".join(small[:5]))
    duplicates = find_duplicates(subject.images)
    for pair in duplicates[:5]:
        log.warning("%s: it counts twice", pair)
    report = DataReport(
        rows, subject.rejects, duplicates, subject.held_out, subject.findings, subject.left_out
    )  # fmt: skip
    return report.write(folder)
