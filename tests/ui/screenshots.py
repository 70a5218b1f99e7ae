"""Screenshots of every tab, light and dark, desktop and phone: ``make screenshots``."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from nora_diffusion.demo import open_example
from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.ui.engine import Engine
from nora_diffusion.ui.jobs.jobs import Jobs
from nora_diffusion.ui.jobs.training_form import build_settings
from nora_diffusion.ui.library import Library
from nora_diffusion.ui.shell import TABS

from .conftest import ROOT, open_tab, start, visit

OUT = ROOT / "outputs" / "screenshots"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
SUBJECTS = ("stripemug-red", "tiger")
PROMPT = "a sks mug in the forest <lora:stripemug-red:1>"


@pytest.fixture(scope="module")
def library() -> Path:
    """Two trained subjects, cached for the next time as long as they match the base."""
    folder, engine = OUT / "library", Engine(BaseSource())
    if any(e.name not in SUBJECTS or e.info is None or engine.mismatch(e.info) for e in Library(folder).entries()):
        shutil.rmtree(folder)
    jobs = Jobs(folder / ".jobs", folder, folder / ".jobs" / "device.lock")
    for slug in SUBJECTS:
        if not (folder / slug).is_dir():
            example = open_example(slug)
            settings = build_settings(engine, "Fast", str(example.values["trigger"]), example.class_word, {})
            identity = jobs.start(slug, settings, sorted(example.folder.glob("*.png")))
            while jobs.get(identity).running:
                time.sleep(0.5)
            assert jobs.get(identity).status == "done", jobs.get(identity).message
    shutil.rmtree(folder / "pictures", ignore_errors=True)
    return folder


def use_generate(page: Any, device: str) -> None:
    page.fill("#prompt textarea", PROMPT)
    page.get_by_label("number input for stripemug-red: weight").wait_for()
    if device == "desktop":
        page.get_by_label("number input for Number of images").first.fill("4")
        page.get_by_label("number input for Number of images").first.blur()
    page.click("#generate")
    page.wait_for_selector("#generate", state="hidden")
    page.wait_for_selector("#generate:visible")


def use_mix(page: Any, device: str) -> None:
    page.locator("#recipe").locator("input, textarea").fill("<lora:stripemug-red:0.8> <lora:tiger:0.6>")
    page.get_by_label("number input for tiger: weight").wait_for()


def use_library(page: Any, device: str) -> None:
    page.locator("[data-name=stripemug-red]").click()
    page.wait_for_selector("#about td")


def use_compare(page: Any, device: str) -> None:
    page.wait_for_function("document.querySelector('#compare-adapter input').value != ''")
    page.locator("#compare-adapter input").click()
    page.get_by_role("option", name="stripemug-red", exact=True).click()
    page.locator("#compare-prompt textarea").fill("a sks mug on the beach")
    page.locator("#compare-x-values").locator("input, textarea").fill("1..3")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator("#compare-status").filter(has_text="cells in").wait_for()


def use_inspect(page: Any, device: str) -> None:
    page.wait_for_function("document.querySelector('#inspect-adapter input').value != ''")
    page.get_by_role("button", name="Inspect", exact=True).click()
    page.locator("#inspect-status").filter(has_text="layers in").wait_for()


USES = {
    "generate": use_generate, "mix": use_mix, "library": use_library, "compare": use_compare, "inspect": use_inspect,
}  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshots(browser: Any, library: Path, tmp_path: Path, scheme: str) -> None:
    server = start(tmp_path, "--library", str(library))
    try:
        for device, (width, height) in SIZES.items():
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            page = context.new_page()
            page.set_default_timeout(240_000)
            visit(page, server.url)
            for name in TABS:
                open_tab(page, name)
                USES.get(name, lambda *_: None)(page, device)
                page.evaluate("scrollTo(0, 0)")
                page.wait_for_timeout(1000)  # images fade in
                page.screenshot(path=OUT / f"{name}-{scheme}-{device}.png", full_page=device == "phone")
            context.close()
    finally:
        server.stop()
