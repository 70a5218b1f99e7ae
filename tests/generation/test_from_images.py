"""Images that start from images: diffusers' own results on every architecture, with adapters and in mixed batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import tiny_pipeline
from factories import randomize
from PIL import Image

from nora_diffusion import UserError, add_adapter, load_adapter, nora, save_adapter, set_adapters, subjects_apart
from nora_diffusion.cli import main
from nora_diffusion.generation.derived import image_pipeline
from nora_diffusion.generation.image_settings import parse_parameters, read_settings
from nora_diffusion.generation.sampling import sample_images, steps_in_all
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.generation.start_image import StartImage
from nora_diffusion.loaders.mixed_batch import mixed_batch
from nora_diffusion.loaders.tokens import add_tokens
from nora_diffusion.pipelines.components import components

SMALL = Sampling(4, 3.0, width=32, height=16)
NAMES = ("sd1", "sd2", "sdxl", "sd3", "flux")
Start = Callable[..., StartImage]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """``start(strength, mask=..., padding=...)``: a photo of 64x32, and a mask that is white on its left half."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((64, 32), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    mask = Image.new("L", (64, 32))
    mask.paste(255, (0, 0, 32, 32))
    mask.save(tmp_path / "mask.png")

    def build(strength: float = 0.5, mask: bool = False, padding: int | None = None) -> StartImage:
        return StartImage(tmp_path / "photo.png", strength, tmp_path / "mask.png" if mask else None, padding)

    return build


def apart(one: Any, two: Any) -> float:
    return float(np.abs(np.asarray(one, float) - np.asarray(two, float)).max())


@pytest.mark.parametrize("mask", [False, True], ids=["image", "mask"])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_diffusers_makes(name: str, mask: bool, start: Start, tmp_path: Path) -> None:
    """Also with an adapter, whose layers are those of the first pipeline: nothing is copied."""
    pipe = tiny_pipeline(name, tmp_path)
    own = start(0.5, mask)
    plain = sample_images(pipe, ["a dog"], [3], SMALL, start=own)[0]
    derived = image_pipeline(pipe, inpaint=mask)
    assert components(derived).keys() == components(pipe).keys()
    assert all(components(derived)[key] is module for key, module in components(pipe).items())
    assert derived.vae is pipe.vae and derived.scheduler is pipe.scheduler
    add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), "dog")
    randomize(pipe, "dog", 0)
    frame = own.frame(16, 16, 32, 16)
    seen: list[int] = []
    found = sample_images(pipe, ["a dog"], [3], SMALL, lambda step, _: seen.append(step), start=own)[0]
    masks = {"mask_image": frame.mask} if mask else {}
    size = {"width": 32, "height": 16} if name not in ("sd1", "sd2", "sdxl") or mask else {}
    expected = derived(
        ["a dog"], image=frame.image, strength=0.5, num_inference_steps=4, guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(3)], **masks, **size,
    ).images[0]  # fmt: skip
    assert found.size == (32, 16) and apart(found, frame.finished(expected)) <= 1
    assert apart(found, plain) > 1 and seen == list(range(1, steps_in_all(SMALL, own) + 1))
    if mask:
        assert apart(np.asarray(found)[:, 20:], np.asarray(frame.image)[:, 20:]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_equal_runs_of_their_own(name: str, start: Start, tmp_path: Path) -> None:
    pipe = tiny_pipeline(name, tmp_path)
    for seed, adapter in enumerate(("dog", "cat")):
        add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), adapter)
        randomize(pipe, adapter, seed, size=0.1)
    alone = []
    for seed, adapter in enumerate(("dog", "cat")):
        set_adapters(pipe, adapter, 0.7)
        alone += sample_images(pipe, ["a dog"], [seed], SMALL, start=start(0.75, mask=True))
    with mixed_batch(pipe, [("dog", 0.7), ("cat", 0.7)]):
        mixed = sample_images(pipe, ["a dog", "a dog"], [0, 1], SMALL, start=start(0.75, mask=True))
    assert all(apart(one, two) <= 1 for one, two in zip(alone, mixed, strict=True))
    assert apart(*mixed) > 1


def test_strength_is_the_share_of_the_steps(start: Start, tmp_path: Path) -> None:
    pipe, sampling = tiny_pipeline("sd1", tmp_path), Sampling(10, 1.0, width=32, height=16)
    for strength, steps in ((0.1, 1), (0.35, 3), (1.0, 10)):
        seen: list[int] = []
        sample_images(pipe, ["a"], [0], sampling, lambda step, _: seen.append(step), start=start(strength))  # noqa: B023
        assert seen == list(range(1, steps + 1)) and steps_in_all(sampling, start(strength)) == steps


def test_the_part_around_a_mask_is_put_into_the_image(start: Start, tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd1", tmp_path)
    own = start(1.0, mask=True, padding=0)
    image = sample_images(pipe, ["a dog"], [0], Sampling(3, 3.0), start=own)[0]
    before = np.asarray(own.pixels[0])
    assert image.size == (64, 32)  # the photo's own size; its left half was made at 16x16
    assert (
        apart(np.asarray(image)[:, 33:], before[:, 33:]) == 0 and apart(np.asarray(image)[:, :24], before[:, :24]) > 1
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_second_pass_starts_from_the_first(name: str, start: Start, tmp_path: Path) -> None:
    pipe = tiny_pipeline(name, tmp_path)
    sampling = Sampling(4, 3.0, width=16, height=16, hires_scale=2.0, hires_strength=0.5)
    (first,) = sample_images(pipe, ["a dog"], [5], Sampling(4, 3.0, width=16, height=16))
    first.save(tmp_path / "first.png")
    seen: list[int] = []
    (image,) = sample_images(pipe, ["a dog"], [5], sampling, lambda step, _: seen.append(step))
    again = StartImage(tmp_path / "first.png", 0.5)
    (expected,) = sample_images(pipe, ["a dog"], [5], Sampling(4, 3.0, width=32, height=32), start=again)
    assert image.size == (32, 32) and apart(image, expected) <= 1
    assert seen == list(range(1, steps_in_all(sampling) + 1)) and len(seen) == 6


def test_subjects_are_kept_apart(start: Start, pipe: Any) -> None:
    pipe.set_progress_bar_config(disable=True)
    for seed, adapter in enumerate(("dog", "cat")):
        add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), adapter)
        randomize(pipe, adapter, seed)
    set_adapters(pipe, ["dog", "cat"])
    prompt, sampling = "a sks dog on the toy cat", Sampling(8, 3.0, width=32, height=32, hires_scale=2.0)
    with subjects_apart(pipe, {"dog": "sks dog", "cat": "toy cat"}):
        apart_images = sample_images(pipe, [prompt], [0], sampling, start=start(0.5))
        with pytest.raises(UserError, match="does not name"):
            sample_images(pipe, ["a dog"], [0], sampling, start=start(0.5))
    together = sample_images(pipe, [prompt], [0], sampling, start=start(0.5))
    assert apart(apart_images[0], together[0]) > 1
    assert "encode_prompt" not in vars(pipe)


def test_new_tokens_work(start: Start, pipe: Any) -> None:
    pipe.set_progress_bar_config(disable=True)
    add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), "dog", ("text_encoder",))
    before = sample_images(pipe, ["a <rex> dog"], [0], SMALL, start=start())[0]
    add_tokens(pipe, components(pipe), "dog", {"<rex>": {"text_encoder": torch.randn(2, 16)}})
    assert apart(sample_images(pipe, ["a <rex> dog"], [0], SMALL, start=start())[0], before) > 1


def test_pipelines_without_one_are_refused(start: Start, tmp_path: Path) -> None:
    pipe = tiny_pipeline("pixart", tmp_path)
    with pytest.raises(UserError, match="no pipeline that could start from an image with PixArt"):
        sample_images(pipe, ["a dog"], [0], SMALL, start=start())
    with pytest.raises(UserError, match="repaint a part"):
        sample_images(pipe, ["a dog"], [0], SMALL, start=start(mask=True))


def test_the_command_line(start: Start, pipe: Any, tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), "dog")
    randomize(pipe, "dog", 0)
    save_adapter(pipe, tmp_path / "dog", "dog")
    own = start(0.5, mask=True)
    common = ["generate", "--base", str(tiny_base), "--prompt", "a sks dog <lora:dog>", "--library", str(tmp_path)]
    common += ["--steps", "4", "--out", str(tmp_path / "out"), "--num", "2", "--seed", "7", "--guidance", "3"]
    flags = ["--init_image", str(own.path), "--strength", "0.5", "--mask", str(own.mask)]
    assert main([*common, *flags, "--width", "32", "--height", "16"]) == 0
    first, second = sorted((tmp_path / "out").glob("*.png"))
    settings = read_settings(first)
    assert settings.start == own.settings() and (settings.width, settings.height) == (32, 16)
    with Image.open(first) as image:
        text = image.text["parameters"]  # type: ignore[attr-defined]
    assert "Denoising strength: 0.5" in text and parse_parameters(text).prompt == "a sks dog"
    load_adapter(pipe, tmp_path / "dog", "again")
    set_adapters(pipe, "again")
    pipe.set_progress_bar_config(disable=True)
    for file, seed in ((first, 7), (second, 8)):
        expected = sample_images(pipe, ["a sks dog"], [seed], SMALL, start=own)[0]
        assert apart(Image.open(file), expected) <= 1
    assert main([*common, "--width", "16", "--height", "16", "--hires_scale", "2"]) == 0
    third = read_settings(sorted((tmp_path / "out").glob("*.png"))[2])
    assert third.hires == {"scale": 2.0, "strength": 0.5} and (third.width, third.height) == (16, 16)
    with Image.open(sorted((tmp_path / "out").glob("*.png"))[2]) as image:
        assert image.size == (32, 32)
        restored = parse_parameters(image.text["parameters"])  # type: ignore[attr-defined]
    assert restored.hires == third.hires
    capsys.readouterr()
    for more, message in [
        (["--mask", str(own.mask)], "give --init_image"),
        (["--strength", "0.5"], "give --init_image"),
        ([*flags, "--hires_scale", "2"], "outside of the mask"),
        (["--hires_scale", "9"], "hires_scale=9.0"),
        (["--init_image", "none.png"], "none.png"),
    ]:
        assert main([*common, *more]) == 2
        assert message in capsys.readouterr().err
