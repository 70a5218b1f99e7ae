"""VAE posteriors of all training images, computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...data.images import SourceImage
from ...data.masks import mask_pixels
from ...data.transforms import View
from .encoding_cache import EncodingCache, Tensors, dtype_and_device, module_hash

MAX_VIEWS, MAX_PIXELS = 4, 2**20
"""Limits of a VAE batch: four views, and the pixels of one view of 1024 x 1024."""


@dataclass(frozen=True)
class Latents:
    """VAE posteriors of all views: ``mean`` and ``std``, each ``[C, h, w]``, fp32 on the CPU.

    ``views_of_image[i]`` has the indices of the views of image ``i``; each step samples from the posterior of one of
    them. ``regions`` are the loss weights of each view by position ``[1, h, w]``, or ``None`` if all are 1.
    """

    mean: list[Tensor]
    std: list[Tensor]
    views_of_image: list[list[int]]
    shift: float
    factor: float
    regions: list[Tensor] | None = None

    def weights(self, views: Sequence[int]) -> Tensor | None:
        """Loss weights of ``views`` by position ``[B, 1, h, w]``, or ``None`` if all are 1."""
        return None if self.regions is None else torch.stack([self.regions[view] for view in views])

    def size_of(self, image: int) -> tuple[int, ...]:
        """Latent height and width of the first view of an image."""
        return tuple(self.mean[self.views_of_image[image][0]].shape[1:])

    def first_images(self, count: int) -> tuple[list[int], Tensor]:
        """Up to ``count`` images of one size, and the scaled mean of the first view of each ``[n, C, h, w]``."""
        images = [i for i in range(len(self.views_of_image)) if self.size_of(i) == self.size_of(0)][:count]
        mean = torch.stack([self.mean[self.views_of_image[image][0]] for image in images])
        return images, (mean - self.shift) * self.factor

    def pick(self, images: Sequence[int], source: torch.Generator, size: tuple[int, ...] | None = None) -> list[int]:
        """A random view of each image, with latents of ``size`` if given."""
        picked = []
        for image in images:
            views = [v for v in self.views_of_image[image] if size is None or tuple(self.mean[v].shape[1:]) == size]
            picked.append(views[int(torch.randint(len(views), (1,), generator=source))])
        return picked

    def draw(self, views: Sequence[int], source: torch.Generator) -> Tensor:
        """Scaled posterior samples of ``views``, which must have one size ``[B, C, h, w]``."""
        mean = torch.stack([self.mean[view] for view in views])
        std = torch.stack([self.std[view] for view in views])
        z = mean + std * torch.randn(mean.shape, generator=source)
        return (z - self.shift) * self.factor


def encode_images(
    vae: nn.Module,
    images: Sequence[SourceImage],
    views: Sequence[Sequence[View]],
    background: float | None = None,
    cache: EncodingCache | None = None,
) -> Latents:
    """Encode the views of all images that are not in ``cache``.

    ``background`` is the loss weight outside the subject masks; ``None`` ignores masks.
    """
    cache = cache or EncodingCache()
    vae_key = [module_hash(vae), *dtype_and_device(vae)] if cache.disk else []
    mean: list[Tensor] = []
    std: list[Tensor] = []
    regions: list[Tensor] = []
    views_of_image = []
    for source, own in zip(images, views, strict=True):
        start, groups = len(mean), _by_shape(own)
        for pixels in _pixels(source, groups):
            # Hashing the pixels covers the file, its decoding and the transform.
            found = cache("latents", partial(_cache_inputs, pixels, vae_key), partial(_encode, vae, pixels))
            mean += found["mean"].unbind()
            std += found["std"].unbind()
        views_of_image.append(list(range(start, len(mean))))
        if background is not None:
            regions += _regions(source, [view for group in groups for view in group], mean[start:], background)
    settings: Any = vae.config
    shift = float(getattr(settings, "shift_factor", None) or 0.0)
    factor = float(settings.scaling_factor)
    return Latents(mean, std, views_of_image, shift, factor, None if background is None else regions)


def _pixels(source: SourceImage, groups: Sequence[Sequence[View]]) -> list[np.ndarray[Any, Any]]:
    """The views of an image, stacked by group. The image itself is not kept."""
    image = source.image
    return [np.stack([view.pixels(image) for view in group]) for group in groups]


def _regions(source: SourceImage, views: Sequence[View], latents: Sequence[Tensor], background: float) -> list[Tensor]:
    """``b + (1 - b) m``, where ``m`` is the mask averaged over each latent position; 1 everywhere without a mask."""
    mask, found = mask_pixels(source), []
    for view, latent in zip(views, latents, strict=True):
        height, width = latent.shape[1:]
        share = torch.ones(height, width)
        if mask is not None:
            share = torch.from_numpy(view.region(mask, (width, height)).copy())
        found.append((background + (1 - background) * share)[None])
    return found


def _by_shape(views: Sequence[View]) -> list[list[View]]:
    return [[view for view in views if view.shape == shape] for shape in dict.fromkeys(v.shape for v in views)]


def _cache_inputs(pixels: np.ndarray[Any, Any], vae_key: list[str]) -> dict[str, Any]:
    return {"pixels": hashlib.sha256(pixels.tobytes()).hexdigest(), "shape": pixels.shape, "vae": vae_key}


@torch.no_grad()
def _encode(vae: Any, pixels: np.ndarray[Any, Any]) -> Tensors:
    """Posteriors of the views of one image; encoding images separately keeps them independent of each other."""
    found = []
    height, width = pixels.shape[-2:]
    batch = min(MAX_VIEWS, max(1, MAX_PIXELS // (height * width)))
    for start in range(0, len(pixels), batch):
        chunk = torch.from_numpy(pixels[start : start + batch])
        posterior = vae.encode(chunk.to(vae.device, vae.dtype)).latent_dist
        found.append((posterior.mean.float().cpu(), posterior.std.float().cpu()))
    mean, std = zip(*found, strict=True)
    return {"mean": torch.cat(mean), "std": torch.cat(std)}
