"""Image files contain their settings; contact sheets contain their images."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from nora_diffusion import UserError
from nora_diffusion.generation.image_settings import (
    MAX_TEXT,
    ImageSettings,
    parse_parameters,
    read_settings,
    save_image,
)
from nora_diffusion.generation.tags import Tag, parse_tags, parse_weight, write_tags
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


@pytest.mark.parametrize("guidance", [7.0, 7.5, 7.123456789, 1 / 3, 1e-07, 0.1 + 0.2, 99.99999999999999, 0.0, 5])
def test_the_guidance_is_not_rounded(guidance: float) -> None:
    settings = replace(SETTINGS, guidance=guidance)
    assert parse_parameters(settings.parameters_text()).guidance == guidance


ODD_PROMPTS = (
    "a dog\nNegative prompt: a cat", "Negative prompt: a cat", "negative prompt: x", "a dog\nSteps: 20, Seed: 7",
    "Steps: 1\nSteps: 2\n", "a dog\n  \tNegative prompt: x", "Negative prompt : x\nNegative prompt  : y\nSteps : 1",
    "a\n\nb\n", "a, b: c", 'a "quoted" dog', "a\\nSteps: 1", "Negative prompt:", "x\rSteps: 5",
    "Steps: 1\u2028Steps: 2", "CFG scale: 3, Size: 1x1", "",
)  # fmt: skip


@pytest.mark.parametrize("prompt", ODD_PROMPTS)
def test_prompts_are_never_taken_for_settings(prompt: str, tmp_path: Path) -> None:
    """Neither by our reader nor by one that goes by the beginnings of lines, as A1111's does."""
    for negative in ("", *ODD_PROMPTS):
        settings = replace(SETTINGS, prompt=prompt, negative_prompt=negative, adapters=[], versions={})
        text = settings.parameters_text()
        assert parse_parameters(text) == settings
        *lines, last = text.strip().split("\n")
        assert last.startswith("Steps: 20, Sampler: ")
        labeled = [line.strip().startswith("Negative prompt:") for line in lines]
        assert sum(labeled) == bool(negative) and not any(line.strip().startswith("Steps:") for line in lines)
    file = save_image(Image.new("RGB", (8, 8)), tmp_path / "a.png", replace(SETTINGS, prompt=prompt))
    assert read_settings(file).prompt == prompt


def test_names_with_commas_and_quotes_stay_whole() -> None:
    """Written as A1111 does: a value with a comma or a colon is a JSON string."""
    base = 'C:\\my models, "new"\\sd: 1, Seed: 9'
    adapters = [{"name": "dog", "weight": 0.5, "te": 0.5, "sha256": "ab" * 32, "path": ""}]
    settings = replace(SETTINGS, base=base, sampler="a, b", adapters=adapters)
    assert parse_parameters(settings.parameters_text()) == settings
    assert f'Model: {json.dumps(base)}, Lora hashes: "dog: {"ab" * 32}"' in settings.parameters_text()


LAST = "Steps: 20, CFG scale: 5, Seed: 3, Size: 64x48"


def test_parameters_of_other_programs() -> None:
    """Quoted values may contain commas and colons; only the hashes are read of them."""
    text = f'a cat <lora:a:0.5>\nNegative prompt: x\n{LAST}, TI: "b, Seed: 9", Lora hashes: "a: AB12, c: 7", Version: 1'
    settings = parse_parameters(text)
    assert (settings.prompt, settings.negative_prompt, settings.seed, settings.width) == ("a cat", "x", 3, 64)
    assert settings.adapters == [{"name": "a", "weight": 0.5, "te": 0.5, "sha256": "ab12", "path": ""}]
    assert parse_parameters(f'a cat\n{LAST}, Lora hashes: "a: AB12').steps == 20
    with pytest.raises(UserError, match="cannot be read") as caught:
        parse_parameters(f"a cat\nSteps: {'9' * 5000}, CFG scale: 5, Seed: 3")
    assert len(str(caught.value)) < 200


PIECES = ("a", " ", "a ", "a: ", 'a: "', 'Lora hashes: "', '"', ", ", "<", "<lora", "< ", "<lora:", "<lora:a:1>", "<>",
          "\n", "\nNegative prompt: ", 'a: "\\', "<lora:a:unet=1:te=2:", "\t", "1", "a:")  # fmt: skip
READERS: dict[str, Callable[[str], Any]] = {
    "prompt": lambda text: parse_parameters(f"{text}\n{LAST}"),
    "last line": lambda text: parse_parameters(f"x\n{LAST}{text}"),
    "hashes": lambda text: parse_parameters(f'x\n{LAST}, Lora hashes: "{text}"'),
    "tags": parse_tags,
    "writing tags": lambda text: write_tags(text, [Tag("new")]),
    "tag": lambda text: parse_tags(f"<lora:a:{text}x>"),
    "weight": lambda text: parse_weight(f"1{text}x", "x"),
}


@pytest.mark.parametrize("reader", READERS)
def test_no_text_takes_more_than_linear_time(reader: str) -> None:
    """Quadratic time would be hours at this length; errors quote only a part."""
    numbered = "".join(f"<lora:a{i}:1>" for i in range(2**14))
    for text in (*(piece * (2**18 // len(piece)) for piece in PIECES), "1" * 2**18 + ".", numbered):
        started = time.process_time()
        with suppress(UserError):
            READERS[reader](text)
        assert time.process_time() - started < 5, text[:20]
    with suppress(UserError):
        READERS[reader]("<lora:" + "a" * 2**20 + ":b>")


@pytest.mark.parametrize("key", ["parameters", "nora_diffusion"])
def test_long_settings_are_not_read(tmp_path: Path, key: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text(key, "a" * (MAX_TEXT + 1), zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "long.png", pnginfo=info)
    with pytest.raises(UserError, match="more than 256 KiB"):
        read_settings(tmp_path / "long.png")


def test_contact_sheet_contains_the_images() -> None:
    row = [(Image.new("RGB", (64, 64), color), "a label of many words that wraps") for color in ("red", "blue")]
    sheet = contact_sheet([row, row[:1]], ["first", "second"], side=128)
    assert sheet.width == 2 * 136 + 8
    colors = {color for _, color in sheet.getcolors(1_000_000) or []}
    assert {(255, 0, 0), (0, 0, 255)} <= colors
