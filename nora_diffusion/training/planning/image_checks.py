"""Checks of the training images before a run: crops beside the subject, and the memory of their encodings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ...data.folder import enumerated
from ...data.images import SourceImage
from ...data.masks import mask_pixels
from ...data.transforms import Transform, View
from ..data.class_images import uses_class_images
from ..data.dataset import transform_of, views_of
from ..step.denoiser import bucket_multiple
from ..step.memory import available, capacity
from .plan import Plan


def missed_subjects(plan: Plan) -> Iterator[tuple[str, bool]]:
    """Photos whose crops are all beside their subject; with a background weight of 0 nothing is learned from them.

    Sentences, each with whether it stops the run.
    """
    images = plan.subject.images
    if plan.config.background_loss_weight != 0:
        return
    missed = [
        image.path.name
        for image, own in zip(images, views_of(_transform(plan), images, plan.config.seed), strict=True)
        if image.mask is not None and not _shows_subject(plan, image, own)
    ]
    if missed:
        yield (
            f"No crop of {len(missed)} of {len(images)} photos shows the subject ({enumerated(missed)}), so nothing is "
            "learned from them: use --crop subject, or a --background_loss_weight above 0.",
            len(missed) == len(images),
        )


def image_memory(plan: Plan) -> Iterator[tuple[str, bool]]:
    """Whether the host has the memory for the latents of all views, which stay, and for decoding one image."""
    stays, decoding = encoded_bytes(plan), decoding_bytes(plan)
    host = torch.device("cpu")
    if stays + decoding > available(host):
        yield (
            f"The encoded images need about {stays / 2**30:.1f} GiB of memory and decoding one {decoding / 2**30:.1f} "
            f"GiB, and there are {available(host) / 2**30:.1f} GiB left: use fewer photos, --num_class_images or "
            "--crops_per_image, or smaller photos.",
            stays + decoding > capacity(host),
        )


def encoded_bytes(plan: Plan) -> int:
    """Bytes of the latents (mean and standard deviation in fp32) and loss weights of all views."""
    config, transform = plan.config, _transform(plan)
    views = views_of(transform, plan.subject.images, config.seed)
    total = sum(_latent_bytes(plan, own, config.background_loss_weight is not None) for own in views)
    if uses_class_images(config):
        size = (config.resolution, config.resolution)
        shapes = sorted({view.shape for own in views for view in own})
        own = [view for shape in shapes for view in replace(transform, shapes=[shape]).views(size)]
        total += config.num_class_images * _latent_bytes(plan, own, False)
    return total


def decoding_bytes(plan: Plan) -> int:
    """The most bytes that decoding one photo or class image and cutting it into views needs."""
    transform, images = _transform(plan), list(plan.subject.images)
    images += plan.class_images.images if uses_class_images(plan.config) else []
    views = transform.crops * (2 if transform.flip else 1)
    return max((image.memory for image in images), default=0) + 12 * views * plan.config.resolution**2


def _latent_bytes(plan: Plan, views: Sequence[View], weighted: bool) -> int:
    numbers, factor = 2 * plan.pipe.vae.config.latent_channels + weighted, plan.pipe.vae_scale_factor
    return sum(4 * numbers * (view.shape[0] // factor) * (view.shape[1] // factor) for view in views)


def _transform(plan: Plan) -> Transform:
    return transform_of(plan.config, plan.config.resolution, bucket_multiple(plan.pipe))


def _shows_subject(plan: Plan, image: SourceImage, views: Sequence[View]) -> bool:
    """Whether any view has a latent of the subject. A box is not enough: the subject may be two things far apart."""
    mask, factor = mask_pixels(image), plan.pipe.vae_scale_factor
    assert mask is not None
    return any(view.region(mask, (view.shape[0] // factor, view.shape[1] // factor)).any() for view in views)
