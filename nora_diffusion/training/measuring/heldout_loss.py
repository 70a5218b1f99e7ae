"""The denoising loss on held-out photos: how well an adapter has learned a subject, without images or judges."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...data import SourceImage
from ...data.transforms import Transform
from ...pipelines.precision import in_fp32, lowered
from ..data.dataset import views_of
from ..data.encoding_cache import EncodingCache
from ..data.latents import encode_images
from ..step.denoiser import TextEmbeddings, predict
from ..step.objective import Objective
from ..step.randomness import generator
from .samples import evaluating

LEVELS = 6
"""Noise levels of each photo."""
MAX_ROWS, MAX_POSITIONS = 32, 2**16
"""Limits of a forward pass: its rows, and the latent positions of all of them (four images of 1024 x 1024)."""


class HeldOutLoss:
    """The held-out loss of a run: photos with their captions, encoded at the first measurement.

    ``embed`` encodes prompts with the text encoders and tokens of that moment. The other arguments are those of
    :func:`encode_photos` and :func:`heldout_losses`.
    """

    def __init__(
        self, pipe: Any, objective: Objective, photos: Sequence[SourceImage], captions: Sequence[str],
        transform: Transform, embed: Callable[[Sequence[str]], TextEmbeddings], dtype: torch.dtype,
        labels: bool = False,
    ) -> None:  # fmt: skip
        self.pipe, self.objective, self.dtype, self.labels = pipe, objective, dtype, labels
        self.captions, self.embed = captions, embed
        self._encode = partial(encode_photos, pipe, photos, transform)
        self._photos: HeldOutPhotos | None = None

    def __call__(self) -> float:
        """The mean loss of the active adapter."""
        return statistics.fmean(self.by_photo())

    @torch.no_grad()
    def by_photo(self) -> list[float]:
        """The mean loss on each photo, over its noise levels."""
        self._photos = self._photos or self._encode()
        with evaluating(self.pipe), lowered(self.dtype, self.objective.signal.device):
            embeddings = self.embed(self.captions)
        losses = heldout_losses(self.pipe, self.objective, self._photos, embeddings, self.dtype, labels=self.labels)
        return losses.mean(dim=1).tolist()


@dataclass(frozen=True)
class HeldOutPhotos:
    """Photos to measure on: scaled latents ``[C, h, w]`` and SHA-256 of each."""

    latents: Sequence[Tensor]
    hashes: Sequence[str]


def encode_photos(
    pipe: Any, photos: Sequence[SourceImage], transform: Transform, cache: EncodingCache | None = None
) -> HeldOutPhotos:
    """The scaled mean of the VAE's posterior of each photo, from a center crop in the shapes of ``transform``.

    Encoded in fp32, since SDXL's VAE overflows in fp16.
    """
    plain = replace(transform, crop="center", crops=1, flip=False)
    with in_fp32(pipe.vae):
        encoded = encode_images(pipe.vae, photos, views_of(plain, photos, seed=0), cache=cache)
    latents = [(mean - encoded.shift) * encoded.factor for mean in encoded.mean]
    return HeldOutPhotos(latents, [photo.sha256 for photo in photos])


def noise_levels(timesteps: int, count: int = LEVELS) -> list[int]:
    """The midpoints of ``count`` equal strata of the levels ``0 .. T - 1``: ``t_k = floor((k + 1/2) T / count)``."""
    return [(2 * k + 1) * timesteps // (2 * count) for k in range(count)]


@torch.no_grad()
def heldout_losses(
    pipe: Any,
    objective: Objective,
    photos: HeldOutPhotos,
    embeddings: TextEmbeddings,
    dtype: torch.dtype,
    *,
    levels: int = LEVELS,
    labels: bool = False,
) -> Tensor:
    """``l_pk = mean (f(s_t x_p + n_t e_pk, t_k, c_p) - target)^2`` by photo and noise level ``[photos, levels]``.

    ``f``: the denoiser with its active adapters, in evaluation mode. ``t_k``: :func:`noise_levels` of the schedule;
    ``e_pk``: noise whose seed is the photo's hash and ``t_k``. So the losses depend only on weights, photos and
    prompts, and adapters are compared at the same noise. The error is the objective's, unweighted and squared; masks
    have no effect. The mean over all is the held-out loss.

    ``embeddings``: one row per photo, of the prompt it would have in training. ``dtype``: the compute dtype, as in
    training. ``labels``: pass the timesteps as class labels.
    """
    plain = replace(objective, weighting="none", loss="l2")
    times = noise_levels(plain.timesteps, levels)
    pairs = [(photo, level) for photo in range(len(photos.latents)) for level in range(levels)]
    losses = torch.zeros(len(photos.latents), levels)
    device = plain.signal.device
    with evaluating(pipe), lowered(dtype, device):
        for rows in _batches(pairs, photos.latents):
            x = torch.stack([photos.latents[p] for p, _ in rows]).to(device)
            e = torch.stack([_noise(photos, p, times[k]) for p, k in rows]).to(device)
            t = torch.tensor([times[k] for _, k in rows], device=device)
            own = {name: value[[p for p, _ in rows]].to(device) for name, value in embeddings.items()}
            noisy = plain.add_noise(x, e, t).to(dtype)
            prediction = predict(pipe, noisy, plain.times[t], own, t if labels else None)
            found = plain.losses(prediction, plain.target(x, e, t), t).cpu()
            for (p, k), loss in zip(rows, found, strict=True):
                losses[p, k] = loss
    return losses


def _noise(photos: HeldOutPhotos, photo: int, t: int) -> Tensor:
    source = generator(0, "held-out", photos.hashes[photo], t)
    return torch.randn(photos.latents[photo].shape, generator=source)


def _batches(pairs: Sequence[tuple[int, int]], latents: Sequence[Tensor]) -> Iterator[list[tuple[int, int]]]:
    """Batches of pairs whose photos have latents of one size."""
    for shape in dict.fromkeys(x.shape for x in latents):
        own = [pair for pair in pairs if latents[pair[0]].shape == shape]
        size = max(1, min(MAX_ROWS, MAX_POSITIONS // (shape[1] * shape[2])))
        for start in range(0, len(own), size):
            yield own[start : start + size]
