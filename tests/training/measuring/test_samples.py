"""Images that the trainer generates: their precision, and locking between trainings."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from factories import write_photos
from runs import Configure, resolve

from nora_diffusion import inspect_adapter
from nora_diffusion.composition.modes import Options
from nora_diffusion.errors import UserError
from nora_diffusion.generation.generate import GenerateConfig
from nora_diffusion.generation.image_settings import ImageSettings, parse_parameters, read_settings
from nora_diffusion.generation.sampling import sample_images
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.io.files import locked_folder
from nora_diffusion.training import train
from nora_diffusion.training.measuring.samples import fill_class_images, generate_images


@pytest.mark.parametrize("lowered", [False, True])
def test_pictures_are_decoded_in_the_precision_of_the_vae(
    lowered: bool, configure: Configure, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SDXL's VAE overflows under autocast, which would give black class images."""
    if lowered:
        pipe.unet.to(torch.bfloat16)
        pipe.text_encoder.to(torch.bfloat16)
    seen: list[tuple[bool, torch.dtype, torch.dtype]] = []
    original = type(pipe.vae).decode

    def decode(self: Any, latents: torch.Tensor, *rest: Any, **named: Any) -> Any:
        decoded = original(self, latents, *rest, **named)
        seen.append((torch.is_autocast_enabled("cpu"), latents.dtype, decoded[0].dtype))
        return decoded

    monkeypatch.setattr(type(pipe.vae), "decode", decode)
    generate_images(pipe, "a dog", [0], resolve(configure(resolution=16)), torch.bfloat16)
    assert seen == [(False, torch.float32, torch.float32)]
    assert "decode" not in vars(pipe.vae)


def test_a_folder_of_class_pictures_is_filled_by_one_training_at_a_time(
    configure: Configure, pipe: Any, tmp_path: Path
) -> None:
    """The second training counts the images after the first one has finished."""
    folder, made = tmp_path / "class", []
    config = resolve(configure(class_data_dir=str(folder), num_class_images=2, resolution=16))
    second = threading.Thread(target=lambda: made.append(fill_class_images(pipe, config, "a dog", lambda: None)))
    with locked_folder(folder):
        second.start()
        second.join(timeout=0.5)
        assert not made and not list(folder.iterdir())
        write_photos(folder, 2)
    second.join()
    assert made == [0] and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("seed", [2**53 + 1, 2**63, 2**64 - 1])
def test_a_large_seed_stays_exact_from_the_run_to_its_images(seed: int, configure: Configure) -> None:
    values: dict[str, Any] = {"seed": seed, "validation_prompt": "a sks dog", "num_validation_images": 2}
    folder = train(configure(max_train_steps=1, **values)).adapter_path.parent
    assert inspect_adapter(folder).seed == seed and yaml.safe_load((folder / "config.yaml").read_text())["seed"] == seed
    images = sorted((folder / "samples").glob("step-000001-*.png"))
    assert [read_settings(image).seed for image in images] == [seed, (seed + 1) % 2**64]
    resumed = train(configure(max_train_steps=2, resume_from_checkpoint="latest", **{**values, "seed": None}))
    assert inspect_adapter(resumed.adapter_path).seed == seed


@pytest.mark.parametrize("seed", [0, 2**53 + 1, 2**63, 2**64 - 1])
def test_a_seed_is_exact_in_the_text_of_other_tools(seed: int) -> None:
    settings = ImageSettings("a dog", seed, 2, 1.0, 16, 16)
    assert parse_parameters(settings.parameters_text()).seed == seed


def test_seeds_beyond_the_largest_are_refused(pipe: Any) -> None:
    for number, refused in ((1, False), (2, True)):
        config = GenerateConfig(["a dog"], num=number, seed=2**64 - 1, sampling=Sampling(1, 1.0))
        if refused:
            with pytest.raises(UserError, match=r"seed=18446744073709551615 is out of range"):
                config.check()
        else:
            config.check()
    with pytest.raises(UserError, match="seed=18446744073709551616 is out of range"):
        Options(seed=2**64).check()
    Options(seed=2**64 - 1).check()
    assert sample_images(pipe, ["a dog"], [2**64 - 1], Sampling(1, 1.0, width=16, height=16))
