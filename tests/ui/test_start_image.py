"""Images that start from images, in the page: a photo, a painted mask, a finished image, and what is refused."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from nora_diffusion import UserError
from nora_diffusion.generation.image_settings import read_settings
from nora_diffusion.io.images import png
from nora_diffusion.ui import AppConfig
from nora_diffusion.ui.state import App
from nora_diffusion.ui.tabs.start_image import PREFIX, SHOWN, start_of

from .conftest import Server, expand
from .test_page import fill, generate, settle


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def give(page: Any, photo: Path) -> Any:
    """Give the photo; returns the canvas over it."""
    expand(page, "Start from an image")
    page.set_input_files("#start-file input[type=file]", photo)
    canvas = page.locator(".painter canvas")
    expect(canvas).to_be_visible()
    return canvas


def paint(page: Any, canvas: Any) -> None:
    """A stroke over the left half."""
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.4)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.6, steps=4)
    page.mouse.up()


def test_a_mask_is_painted_on_a_photo(page: Any, server: Server, photo: Path) -> None:
    fill(page, "a sks dog <lora:dog:0.8>")
    settle(page)
    canvas = give(page, photo)
    whole = read_settings(generate(page, server))
    assert whole.start["strength"] == 0.7 and "mask" not in whole.start
    paint(page, canvas)
    file = generate(page, server)
    settings = read_settings(file)
    assert settings.start["padding"] == 40 and settings.start["sha256"] == whole.start["sha256"]
    with Image.open(file) as image, Image.open(photo) as before:
        changed = (np.asarray(image) != np.asarray(before)).any(-1)
        assert image.size == before.size
    assert changed[80:160, 60:100].mean() > 0.5 and not changed[:, 200:].any()
    page.get_by_text("Clear", exact=True).click()
    assert "mask" not in read_settings(generate(page, server)).start
    page.locator("#start-file").get_by_label(re.compile("Clear|Remove", re.IGNORECASE)).first.click()
    expect(canvas).to_have_count(0)
    assert read_settings(generate(page, server)).start == {}


def test_a_finished_image_is_started_from(page: Any, server: Server) -> None:
    fill(page, "a dog")
    settle(page)
    first = generate(page, server)
    expect(page.locator("#start-from-this")).to_be_hidden()
    page.locator("#gallery button img").first.click()
    page.locator("#start-from-this").click()
    expect(page.locator(".painter canvas")).to_be_visible()
    start = read_settings(generate(page, server)).start
    assert start["image"] == first.name


def test_a_file_that_is_no_image_is_named(page: Any, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    expand(page, "Start from an image")
    page.set_input_files("#start-file input[type=file]", tmp_path / "text.png")
    expect(page.locator("#start-painter .bad")).to_contain_text("text.png")


def test_painted_masks_are_checked(tmp_path: Path, photo: Path) -> None:
    app = App(AppConfig(library=str(tmp_path / "library")), tmp_path / "files")

    def painted(image: Image.Image) -> str:
        return PREFIX + base64.b64encode(png(image)).decode()

    assert start_of(app, None, "anything", 0.5, True) is None
    for mask in ("http://elsewhere/mask.png", PREFIX + "?", PREFIX + "AAAA", f"{PREFIX}{'A' * 1000}"):
        with pytest.raises(UserError, match=r"paint it again|cannot be read"):
            start_of(app, str(photo), mask, 0.5, True)
    with pytest.raises(UserError, match=f"more than {SHOWN} pixels"):
        start_of(app, str(photo), painted(Image.new("L", (SHOWN + 1, 4), 255)), 0.5, True)
    start = start_of(app, str(photo), painted(Image.new("L", (32, 24), 255)), 0.5, False)
    assert start is not None and start.mask is not None and start.padding is None
    assert start.mask.is_relative_to(app.scratch) and start.region == (0, 0, 320, 240)
