"""What does not change while the UNet trains, computed once: latents of the crops and text embeddings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..data import Photo, crop_boxes, square
from .config import TrainConfig
from .denoiser import Conditions, encode_prompts, family_of
from .randomness import derive

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Latents:
    """The VAE's posterior of every crop: ``mean``, ``std [crops, C, h, w]``, fp32 on the CPU.

    ``of_photo[i]`` lists the crops of photo ``i``. Each step draws a new sample of it.
    """

    mean: Tensor
    std: Tensor
    of_photo: list[list[int]]
    shift: float
    factor: float

    def first_crops(self, count: int) -> Tensor:
        """Scaled mean latents of the first crop of each of the first ``count`` photos ``[n, C, h, w]``."""
        rows = [crops[0] for crops in self.of_photo[:count]]
        return (self.mean[rows] - self.shift) * self.factor

    def sample(self, photos: Sequence[int], generator: torch.Generator) -> Tensor:
        """Scaled latents of one random crop of each photo ``[B, C, h, w]``."""
        rows = []
        for photo in photos:
            crops = self.of_photo[photo]
            rows.append(crops[int(torch.randint(len(crops), (1,), generator=generator))])
        mean, std = self.mean[rows], self.std[rows]
        z = mean + std * torch.randn(mean.shape, generator=generator)
        return (z - self.shift) * self.factor


def encode_photos(vae: nn.Module, photos: Sequence[Photo], config: TrainConfig, resolution: int, seed: int) -> Latents:
    """Crop, resize and encode every photo; mirrored twins are added where ``random_flip`` asks for them."""
    resample = Image.Resampling[config.image_interpolation_mode.upper()]
    random = np.random.default_rng(derive(seed, "crops"))
    pictures: list[Tensor] = []
    of_photo: list[list[int]] = []
    small = [photo.path.name for photo in photos if min(photo.image.size) < resolution]
    if small:
        log.warning("%s: smaller than the resolution %d, so enlarged", ", ".join(small[:5]), resolution)
    for photo in photos:
        start = len(pictures)
        for box in crop_boxes(photo.image.size, config.crops_per_image, config.center_crop, random):
            pixels = square(photo.image, box, resolution, resample)
            views = [pixels, pixels[:, :, ::-1]] if config.random_flip else [pixels]
            pictures += [torch.from_numpy(view.copy()) for view in views]
        of_photo.append(list(range(start, len(pictures))))
    mean, std = _encode(vae, pictures)
    settings: Any = vae.config
    return Latents(
        mean,
        std,
        of_photo,
        float(getattr(settings, "shift_factor", None) or 0.0),
        float(settings.scaling_factor),
    )


@torch.no_grad()
def _encode(vae: Any, pictures: Sequence[Tensor], batch: int = 4) -> tuple[Tensor, Tensor]:
    means, deviations = [], []
    for start in range(0, len(pictures), batch):
        pixels = torch.stack(list(pictures[start : start + batch])).to(vae.device, vae.dtype)
        posterior = vae.encode(pixels).latent_dist
        means.append(posterior.mean.float().cpu())
        deviations.append(posterior.std.float().cpu())
    return torch.cat(means), torch.cat(deviations)


class TextConditions:
    """Prompts as the UNet wants them: from a cache, or afresh each step while the text encoder is trained."""

    def __init__(self, pipe: Any, config: TrainConfig, prompts: Sequence[str]) -> None:
        self._pipe, self._encoder, self._length = pipe, pipe.text_encoder, config.tokenizer_max_length
        self._plain = family_of(pipe) == "sd"
        self._live = config.train_text_encoder
        self._masked = config.text_encoder_use_attention_mask
        unique = list(dict.fromkeys(prompts))
        self._prompts = unique
        self._row = {prompt: row for row, prompt in enumerate(unique)}
        self._ids, self._mask = tokenize(pipe.tokenizer, unique, config.tokenizer_max_length if self._plain else None)
        device = self._encoder.device
        self._ids, self._mask = self._ids.to(device), self._mask.to(device)
        if not self._live:
            with torch.no_grad():
                self._cached = self._encode(list(range(len(unique))))

    def __call__(self, prompts: Sequence[str]) -> Conditions:
        """What the denoiser is told of these prompts."""
        rows = [self._row[prompt] for prompt in prompts]
        return self._encode(rows) if self._live else {name: value[rows] for name, value in self._cached.items()}

    def _encode(self, rows: list[int]) -> Conditions:
        if not self._plain:
            return encode_prompts(self._pipe, [self._prompts[row] for row in rows], self._length)
        mask = self._mask[rows] if self._masked else None
        hidden: Tensor = self._encoder(self._ids[rows], attention_mask=mask, return_dict=False)[0]
        return {"hidden": hidden}


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int | None) -> tuple[Tensor, Tensor]:
    """Token ids and padding mask ``[prompts, length]``; a prompt that is cut short is named in a warning."""
    length = length or tokenizer.model_max_length
    encoded = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    for prompt in prompts:
        if len(tokenizer(prompt, truncation=False).input_ids) > length:
            log.warning("%r is longer than %d tokens: its end is cut off", prompt, length)
    return encoded.input_ids, encoded.attention_mask
