"""What the photos are to the denoiser, computed once: the VAE's posterior of every training picture."""

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
from ...data.transforms import View
from .encoding_cache import EncodingCache, Tensors, module_hash, place

MOST_VIEWS, MOST_PIXELS = 4, 2**20
"""What the VAE is given at once: up to four views, as far as their pixels are those of one of 1024 x 1024."""


@dataclass(frozen=True)
class Latents:
    """The posterior of every training picture: ``mean``, ``std``, each ``[C, h, w]``, fp32 on the CPU.

    ``of_image[i]`` lists the pictures made of photo ``i``. Each step draws a new sample of one of them. ``regions`` has
    the weight of each place of a picture in the loss ``[1, h, w]``, where that is not 1 everywhere.
    """

    mean: list[Tensor]
    std: list[Tensor]
    views_of_image: list[list[int]]
    shift: float
    factor: float
    regions: list[Tensor] | None = None

    def weights(self, pictures: Sequence[int]) -> Tensor | None:
        """Weights of the places of ``pictures`` in the loss ``[B, 1, h, w]``; ``None``: all the same."""
        return None if self.regions is None else torch.stack([self.regions[picture] for picture in pictures])

    def size_of(self, photo: int) -> tuple[int, ...]:
        """Height and width of a photo's first picture, as latents."""
        return tuple(self.mean[self.views_of_image[photo][0]].shape[1:])

    def first_images(self, count: int) -> tuple[list[int], Tensor]:
        """Up to ``count`` photos of the first one's size, and the scaled mean of a picture of each ``[n, C, h, w]``."""
        photos = [i for i in range(len(self.views_of_image)) if self.size_of(i) == self.size_of(0)][:count]
        mean = torch.stack([self.mean[self.views_of_image[photo][0]] for photo in photos])
        return photos, (mean - self.shift) * self.factor

    def pick(self, photos: Sequence[int], source: torch.Generator, size: tuple[int, ...] | None = None) -> list[int]:
        """One random picture of each photo, of those with latents of ``size`` where that is given."""
        picked = []
        for photo in photos:
            pictures = [p for p in self.views_of_image[photo] if size is None or tuple(self.mean[p].shape[1:]) == size]
            picked.append(pictures[int(torch.randint(len(pictures), (1,), generator=source))])
        return picked

    def draw(self, pictures: Sequence[int], source: torch.Generator) -> Tensor:
        """Scaled samples of the posteriors of ``pictures``, which have one size ``[B, C, h, w]``."""
        mean = torch.stack([self.mean[picture] for picture in pictures])
        std = torch.stack([self.std[picture] for picture in pictures])
        z = mean + std * torch.randn(mean.shape, generator=source)
        return (z - self.shift) * self.factor


def encode_images(
    vae: nn.Module,
    photos: Sequence[SourceImage],
    views: Sequence[Sequence[View]],
    background: float | None = None,
    cache: EncodingCache | None = None,
) -> Latents:
    """Encode the views of every photo, as far as ``cache`` does not have them.

    ``background`` is the weight of the loss beside the subjects' masks.
    """
    cache = cache or EncodingCache()
    made_by = [module_hash(vae), *place(vae)] if cache.disk else []
    mean: list[Tensor] = []
    std: list[Tensor] = []
    of_image = []
    for photo, own in zip(photos, views, strict=True):
        start = len(mean)
        for group in _by_shape(own):
            pixels = np.stack([view.pixels(photo.image) for view in group])
            # The pixels stand for the file, how it was decoded and the transform.
            found = cache("latents", partial(_ingredients, pixels, made_by), partial(_encode, vae, pixels))
            mean += found["mean"].unbind()
            std += found["std"].unbind()
        of_image.append(list(range(start, len(mean))))
    regions = None if background is None else _regions(photos, views, mean, background)
    settings: Any = vae.config
    shift = float(getattr(settings, "shift_factor", None) or 0.0)
    return Latents(mean, std, of_image, shift, float(settings.scaling_factor), regions)


def _regions(
    photos: Sequence[SourceImage], views: Sequence[Sequence[View]], latents: Sequence[Tensor], background: float
) -> list[Tensor]:
    """``b + (1 - b) m``: ``m`` is the subject's share of what a latent sees; 1 everywhere without a mask."""
    pairs = [
        (photo, view) for photo, own in zip(photos, views, strict=True) for group in _by_shape(own) for view in group
    ]
    found = []
    for (photo, view), latent in zip(pairs, latents, strict=True):
        height, width = latent.shape[1:]
        share = torch.ones(height, width)
        if photo.mask is not None:
            share = torch.from_numpy(view.region(photo.mask, (width, height)).copy())
        found.append((background + (1 - background) * share)[None])
    return found


def _by_shape(views: Sequence[View]) -> list[list[View]]:
    return [[view for view in views if view.shape == shape] for shape in dict.fromkeys(v.shape for v in views)]


def _ingredients(pixels: np.ndarray[Any, Any], made_by: list[str]) -> dict[str, Any]:
    return {"pixels": hashlib.sha256(pixels.tobytes()).hexdigest(), "shape": pixels.shape, "vae": made_by}


@torch.no_grad()
def _encode(vae: Any, pixels: np.ndarray[Any, Any]) -> Tensors:
    """The posteriors of one photo's views: the numbers of one photo do not depend on which others are there."""
    found = []
    height, width = pixels.shape[-2:]
    batch = min(MOST_VIEWS, max(1, MOST_PIXELS // (height * width)))
    for start in range(0, len(pixels), batch):
        chunk = torch.from_numpy(pixels[start : start + batch])
        posterior = vae.encode(chunk.to(vae.device, vae.dtype)).latent_dist
        found.append((posterior.mean.float().cpu(), posterior.std.float().cpu()))
    mean, std = zip(*found, strict=True)
    return {"mean": torch.cat(mean), "std": torch.cat(std)}
