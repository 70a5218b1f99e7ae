"""Image files contain their settings; contact sheets contain their images."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from nora_diffusion import UserError
from nora_diffusion.generation.image_settings import ImageSettings, read_settings, save_image
from nora_diffusion.reports.sheets import contact_sheet

SETTINGS = ImageSettings(
    prompt="a sks dog, ünïcode", seed=7, steps=20, guidance=5.0, width=64, height=64, negative_prompt="blur",
    sampler="DDIMScheduler", base="tiny", adapters=[{"name": "dog", "weight": 0.8, "sha256": "ab" * 32, "path": "p"}],
)  # fmt: skip


def test_settings_round_trip(tmp_path: Path) -> None:
    path = save_image(Image.new("RGB", (64, 64), "red"), tmp_path / "a.png", SETTINGS)
    assert read_settings(path) == SETTINGS
    with Image.open(path) as image:
        text = image.text["parameters"]  # type: ignore[attr-defined]
        assert image.convert("RGB").getpixel((3, 3)) == (255, 0, 0)
    first, negative, rest = text.split("\n")
    assert first == "a sks dog, ünïcode <lora:dog:0.8>"
    assert negative == "Negative prompt: blur"
    assert rest.startswith("Steps: 20, Sampler: DDIMScheduler, CFG scale: 5, Seed: 7, Size: 64x64, Model: tiny")
    assert "ab" * 32 in rest


def test_images_without_settings_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("not an image")
    for name, word in (("plain.png", "no settings"), ("text.png", "cannot be read")):
        with pytest.raises(UserError, match=word):
            read_settings(tmp_path / name)


def test_contact_sheet_contains_the_images() -> None:
    row = [(Image.new("RGB", (64, 64), color), "a label of many words that wraps") for color in ("red", "blue")]
    sheet = contact_sheet([row, row[:1]], ["first", "second"], side=128)
    assert sheet.width == 2 * 136 + 8
    colors = {color for _, color in sheet.getcolors(1_000_000) or []}
    assert {(255, 0, 0), (0, 0, 255)} <= colors
