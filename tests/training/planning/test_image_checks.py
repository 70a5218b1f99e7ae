"""The memory of the training images, counted before the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import write_photos
from PIL import Image
from runs import Configure

from nora_diffusion.errors import UserError
from nora_diffusion.training import check, train
from nora_diffusion.training.data.dataset import class_views, transform_of, views_of
from nora_diffusion.training.data.latents import Latents, encode_images
from nora_diffusion.training.data.subject import read_subject
from nora_diffusion.training.planning.image_checks import decoding_bytes, encoded_bytes
from nora_diffusion.training.planning.plan import plan_on
from nora_diffusion.training.settings.defaults import with_defaults
from nora_diffusion.training.step.denoiser import bucket_multiple

MODULE = "nora_diffusion.training.planning.image_checks"


def held_bytes(latents: Latents) -> int:
    return sum(tensor.nbytes for tensor in (*latents.mean, *latents.std, *(latents.regions or [])))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crops_per_image": 3, "random_flip": True},
        {"aspect_buckets": True, "resolution": 32},
        {"background_loss_weight": 0.5, "crops_per_image": 2},
        {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 3, "aspect_buckets": True},
    ],
)
def test_the_estimate_is_what_the_encodings_take(
    changes: dict[str, Any], configure: Configure, pipe: Any, tmp_path: Path
) -> None:
    folder = write_photos(tmp_path / "photos", 2, (48, 24))
    (folder / "masks").mkdir()
    Image.new("L", (48, 24), 255).save(folder / "masks" / "0.png")
    config = with_defaults(configure(instance_data_dir=str(folder), **changes))
    plan = plan_on(config, read_subject(config), pipe, torch.device("cpu"))
    images, transform = plan.subject.images, transform_of(config, plan.config.resolution, bucket_multiple(pipe))
    views = views_of(transform, images, 0)
    held = held_bytes(encode_images(pipe.vae, images, views, config.background_loss_weight))
    if config.with_prior_preservation:
        square = write_photos(tmp_path / "class", 3, (16, 16))
        from nora_diffusion.data import read_images

        found = read_images(square)
        held += held_bytes(encode_images(pipe.vae, found, class_views(transform, found, 0, views)))
    assert encoded_bytes(plan) == held
    assert decoding_bytes(plan) >= 4 * 48 * 24 * 4


def test_photos_that_do_not_fit_into_memory(
    configure: Configure, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{MODULE}.available", lambda device: 1000)
    (finding,) = [found for found in check(configure()) if "encoded images" in found.text]
    assert not finding.fatal and "use fewer photos" in finding.text
    monkeypatch.setattr(f"{MODULE}.capacity", lambda device: 1000)
    with pytest.raises(UserError, match="The encoded images need about"):
        train(configure())
    assert not configure().folder.exists()
