"""Disk cache of encodings: used if all inputs are equal, and never otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import tiny_random_pipeline
from PIL import Image
from runs import Configure
from torch import nn

from nora_diffusion.data import SourceImage, read_source
from nora_diffusion.data.transforms import Transform
from nora_diffusion.pipelines.base import open_pipeline
from nora_diffusion.training import TrainConfig, train
from nora_diffusion.training.data.encoding_cache import EncodingCache
from nora_diffusion.training.data.latents import Latents, encode_images
from nora_diffusion.training.data.prompts import PromptEmbeddings
from nora_diffusion.training.run.steps import Stepper

SQUARE = Transform([(16, 16)])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pipe(tiny_base: Path) -> Any:
    return open_pipeline(tiny_base)


@pytest.fixture
def photo(photos: Path, tmp_path: Path) -> SourceImage:
    return read_source(Path(shutil.copy(photos / "0.png", tmp_path)))


def entries(cache: Path, kind: str) -> int:
    return len(list(cache.glob(f"{kind}-*.safetensors")))


def encode(pipe: Any, photo: SourceImage, transform: Transform = SQUARE) -> Latents:
    return encode_images(pipe.vae, [photo], [transform.views(photo.image.size)], cache=EncodingCache(disk=True))


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("encoded again")


def test_cached_latents_are_equal_bit_for_bit(
    pipe: Any, photo: SourceImage, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = encode(pipe, photo)
    monkeypatch.setattr(type(pipe.vae), "encode", refuse)
    moved = read_source(Path(shutil.copy(photo.path, tmp_path / "elsewhere.png")))
    again = encode(pipe, moved)
    assert entries(cache, "latents") == 1
    assert torch.equal(first.mean[0], again.mean[0]) and torch.equal(first.std[0], again.std[0])


def one_bit_changed(photo: SourceImage) -> SourceImage:
    pixels = np.asarray(photo.image).copy()
    pixels[10, 10, 0] ^= 1
    changed = photo.path.with_name("changed")
    Image.fromarray(pixels).save(changed, "PNG")
    return read_source(changed)


def nudge(module: nn.Module) -> None:
    """Change one weight by one unit in the last place."""
    weight = next(module.parameters()).data.view(-1)
    weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))


LATENT_CHANGES: dict[str, Callable[[Any, SourceImage], tuple[Any, SourceImage, Transform]]] = {
    "one bit of one pixel": lambda pipe, photo: (pipe, one_bit_changed(photo), Transform([photo.image.size])),
    "resolution": lambda pipe, photo: (pipe, photo, Transform([(24, 24)])),
    "shape": lambda pipe, photo: (pipe, photo, Transform([(24, 16)])),
    "crop": lambda pipe, photo: (pipe, photo, Transform([(16, 16)], "random")),
    "flip": lambda pipe, photo: (pipe, photo, Transform([(16, 16)], flip=True)),
    "filter": lambda pipe, photo: (pipe, photo, Transform([(16, 16)], resample=Image.Resampling.BILINEAR)),
    "weight of the VAE": lambda pipe, photo: (nudge(pipe.vae), (pipe, photo, SQUARE))[1],
    "setting of the VAE": lambda pipe, photo: (pipe.vae.register_to_config(act_fn="gelu"), (pipe, photo, SQUARE))[1],
    "precision of the VAE": lambda pipe, photo: (pipe.vae.to(torch.float64), (pipe, photo, SQUARE))[1],
}


@pytest.mark.parametrize("change", LATENT_CHANGES.values(), ids=LATENT_CHANGES.keys())
def test_every_input_of_latents_changes_the_key(
    change: Callable[..., Any], pipe: Any, photo: SourceImage, cache: Path
) -> None:
    encode(pipe, photo)
    encode(pipe, photo, Transform([photo.image.size]))
    before = entries(cache, "latents")
    pipe, photo, transform = change(pipe, photo)
    found = encode(pipe, photo, transform)
    assert entries(cache, "latents") == before + 1
    fresh = encode_images(pipe.vae, [photo], [transform.views(photo.image.size)])
    assert all(torch.equal(a, b) for a, b in zip(found.mean, fresh.mean, strict=True))


def embeddings(pipe: Any, config: TrainConfig, *prompts: str) -> torch.Tensor:
    return PromptEmbeddings(pipe, config, prompts, EncodingCache(disk=True))(prompts)["hidden"]


def test_cached_text_embeddings_are_equal_bit_for_bit(pipe: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = embeddings(pipe, TrainConfig(), "a dog", "a cat")
    assert entries(cache, "text") == 2
    monkeypatch.setattr(type(pipe.text_encoder), "forward", refuse)
    assert torch.equal(embeddings(pipe, TrainConfig(), "a cat", "a dog"), first.flip(0))


def other_tokens(pipe: Any) -> None:
    pipe.tokenizer.add_tokens(["dog"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)


TEXT_CHANGES: dict[str, Callable[[Any], tuple[TrainConfig, str]]] = {
    "caption": lambda pipe: (TrainConfig(), "a red dog"),
    "attention mask": lambda pipe: (TrainConfig(text_encoder_use_attention_mask=True), "a dog"),
    "length": lambda pipe: (TrainConfig(tokenizer_max_length=8), "a dog"),
    "weight of the encoder": lambda pipe: (nudge(pipe.text_encoder), (TrainConfig(), "a dog"))[1],
    "precision": lambda pipe: (pipe.text_encoder.to(torch.float64), (TrainConfig(), "a dog"))[1],
    "tokenizer": lambda pipe: (other_tokens(pipe), (TrainConfig(), "a dog"))[1],
}


@pytest.mark.parametrize("change", TEXT_CHANGES.values(), ids=TEXT_CHANGES.keys())
def test_every_input_of_text_changes_the_key(change: Callable[..., Any], pipe: Any, cache: Path) -> None:
    embeddings(pipe, TrainConfig(), "a dog")
    config, prompt = change(pipe)
    found = embeddings(pipe, config, prompt)
    assert entries(cache, "text") == 2
    assert torch.equal(found, PromptEmbeddings(pipe, config, [prompt])([prompt])["hidden"])


def test_versions_change_the_key(pipe: Any, photo: SourceImage, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode(pipe, photo)
    monkeypatch.setattr("nora_diffusion.training.data.encoding_cache.versions", lambda: {"torch": "99"})
    encode(pipe, photo)
    assert entries(cache, "latents") == 2


def test_tf32_changes_the_key(pipe: Any, photo: SourceImage, cache: Path) -> None:
    matmul: Any = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has no fp32_precision")
    before = matmul.fp32_precision
    encode(pipe, photo)
    try:
        matmul.fp32_precision = "tf32"
        encode(pipe, photo)
    finally:
        matmul.fp32_precision = before
    assert entries(cache, "latents") == 2


def test_a_damaged_entry_is_encoded_again(pipe: Any, photo: SourceImage, cache: Path) -> None:
    first = encode(pipe, photo)
    (entry,) = cache.glob("latents-*")
    data = bytearray(entry.read_bytes())
    data[-3] ^= 1
    entry.write_bytes(bytes(data))
    assert torch.equal(encode(pipe, photo).mean[0], first.mean[0])
    assert entry.read_bytes() != bytes(data)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_runs_with_disk_and_memory_cache_are_equal(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, also with class images; the second run encodes nothing, a run with another base does."""
    prior: dict[str, Any] = {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2,
                             "class_data_dir": str(tmp_path / "dogs"), "shuffle_tags": 3}  # fmt: skip
    for name, location in {"memory": "memory", "first": "disk"}.items():
        train(configure(output_dir=str(tmp_path / name), cache_latents=location, **prior))
    from diffusers import AutoencoderKL

    other = tiny_random_pipeline(tmp_path / "other", seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKL, "encode", refuse)
        train(configure(output_dir=str(tmp_path / "second"), cache_latents="disk", **prior))
        with pytest.raises(AssertionError, match="encoded again"):
            train(configure(output_dir=str(tmp_path / "third"), cache_latents="disk",
                            pretrained_model_name_or_path=str(other), **prior))  # fmt: skip
    assert losses(tmp_path / "memory") == losses(tmp_path / "first") == losses(tmp_path / "second")


def test_steps_run_only_the_denoiser(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    original = Stepper.step

    def step(self: Stepper, number: int) -> tuple[float, float]:
        with monkeypatch.context() as patch:
            patch.setattr(AutoencoderKL, "encode", refuse)
            patch.setattr(CLIPTextModel, "forward", refuse)
            return original(self, number)

    monkeypatch.setattr(Stepper, "step", step)
    config = configure(shuffle_tags=4, caption_dropout=0.3, random_flip=True, aspect_buckets=True)
    train(config)
    assert len(losses(config.folder)) == 3
