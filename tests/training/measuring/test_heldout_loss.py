"""The held-out loss against its formula, one photo and level at a time, on every kind of base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_pipeline
from diffusers import DDPMScheduler
from factories import randomize, tiny_random_pipeline, write_photos
from torch import Tensor

from nora_diffusion import add_adapter, lora, mixed_batch, open_pipeline
from nora_diffusion.data import read_images
from nora_diffusion.data.transforms import Transform
from nora_diffusion.pipelines.components import denoiser
from nora_diffusion.training.measuring.heldout_loss import HeldOutPhotos, encode_photos, heldout_losses, noise_levels
from nora_diffusion.training.step.denoiser import encode_prompts, predict
from nora_diffusion.training.step.objective import Objective, is_flow
from nora_diffusion.training.step.seeds import derive

pytestmark = pytest.mark.filterwarnings("ignore:The following part of your input was truncated")


def photos_of(pipe: Any, *sizes: tuple[int, int]) -> HeldOutPhotos:
    channels = pipe.vae.config.latent_channels
    source = torch.Generator().manual_seed(1)
    latents = [torch.randn(channels, *size, generator=source) for size in sizes]
    return HeldOutPhotos(latents, [f"photo {number}" for number in range(len(sizes))])


def by_hand(pipe: Any, photos: HeldOutPhotos, prompts: list[str], embed: Any, levels: list[int]) -> Tensor:
    """Row by row with the schedulers' own formulas."""
    denoiser(pipe).eval()
    found = []
    for x, sha256, prompt in zip(photos.latents, photos.hashes, prompts, strict=True):
        for t in levels:
            source = torch.Generator().manual_seed(derive(0, "held-out", sha256, t))
            e = torch.randn(x.shape, generator=source)
            if is_flow(pipe.scheduler):
                k, u = pipe.scheduler.config.shift, (t + 1) / 1000
                n = k * u / (1 + (k - 1) * u)
                noisy, target, time = (1 - n) * x + n * e, e - x, n * 1000
            else:
                scheduler, step = DDPMScheduler.from_config(pipe.scheduler.config), torch.tensor([t])
                v = scheduler.config.prediction_type == "v_prediction"
                noisy = scheduler.add_noise(x, e, step)
                target, time = scheduler.get_velocity(x, e, step) if v else e, float(t)
            guess = predict(pipe, noisy[None], torch.tensor([time]), embed([prompt]), None)[0]
            found.append(float((guess - target).square().mean()))
    return torch.tensor(found).view(-1, len(levels))


@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "sdxl", "sd3", "flux"])
@torch.no_grad()
def test_the_losses_are_the_formula(name: Any, tmp_path: Path) -> None:
    stable = name in ("epsilon", "v_prediction")
    pipe: Any = open_pipeline(tiny_random_pipeline(tmp_path, name)) if stable else tiny_pipeline(name, tmp_path)
    add_adapter(pipe, lora(r=2), "one")
    randomize(pipe)
    photos = photos_of(pipe, (8, 8), (4, 8), (8, 8))
    prompts = ["a photo of sks dog", "a red hat", "a sks dog"]
    length = 16 if name in ("sd3", "flux") else None

    def embed(texts: list[str]) -> dict[str, Tensor]:
        return encode_prompts(pipe, texts, length)

    denoiser(pipe).train()
    objective = Objective.of(pipe.scheduler, 5.0, loss="huber")  # the weights and loss of the training have no part
    found = heldout_losses(pipe, objective, photos, embed(prompts), torch.float32, levels=2)
    assert denoiser(pipe).training
    assert torch.allclose(found, by_hand(pipe, photos, prompts, embed, [250, 750]), rtol=1e-4)


@torch.no_grad()
def test_rows_of_a_mixed_batch_are_measured_with_their_adapter(tiny_base: Path) -> None:
    pipe: Any = open_pipeline(tiny_base)
    photos, objective = photos_of(pipe, (8, 8), (8, 8)), Objective.of(pipe.scheduler)
    embeddings = encode_prompts(pipe, ["a red hat", "a sks dog"])
    alone, shared = [], []
    for number, name in enumerate(("one", "two")):
        add_adapter(pipe, lora(r=2), name)
        randomize(pipe, name, seed=number)
        pipe.set_adapters(name)
        alone.append(heldout_losses(pipe, objective, photos, embeddings, torch.float32))
    for name in ("one", "two"):
        with mixed_batch(pipe, [name]):
            shared.append(heldout_losses(pipe, objective, photos, embeddings, torch.float32))
    assert not torch.allclose(alone[0], alone[1], rtol=1e-3)
    assert torch.allclose(torch.stack(shared), torch.stack(alone), rtol=1e-4)


def test_photos_are_encoded_without_noise_crops_and_flips(tiny_base: Path, tmp_path: Path) -> None:
    pipe: Any = open_pipeline(tiny_base)
    images = read_images(write_photos(tmp_path / "photos", 2, (24, 20)))
    found = encode_photos(pipe, images, Transform([(16, 16)], "random", 4, True))
    pixels = torch.from_numpy(Transform([(16, 16)]).views((24, 20))[0].pixels(images[1].image))
    mean = pipe.vae.encode(pixels[None]).latent_dist.mean[0]
    assert torch.allclose(found.latents[1], mean * pipe.vae.config.scaling_factor, atol=1e-5)
    assert len(found.latents) == 2 and found.hashes[1] == images[1].sha256


def test_levels_are_midpoints_of_equal_strata() -> None:
    assert noise_levels(1000) == [83, 250, 416, 583, 750, 916]
