"""Images that the trainer generates: their precision, and locking between trainings."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import write_photos
from runs import Configure, resolve

from nora_diffusion.io.files import locked_folder
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
