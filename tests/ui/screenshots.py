"""Pictures of every tab, light and dark, desktop and phone, for eyes: ``make screenshots``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from nora_diffusion.demo import EXAMPLES
from nora_diffusion.ui.shell import TABS

from .conftest import ROOT, open_tab, start, visit

OUT = ROOT / "outputs" / "screenshots"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshots(browser: Any, tmp_path: Path, scheme: str) -> None:
    shutil.rmtree(tmp_path / "library", ignore_errors=True)
    finished = next((p for p in (ROOT / "outputs" / "demo",) if (p / "nora_adapter.safetensors").is_file()), None)
    if finished:
        (tmp_path / "library" / "stripemug").mkdir(parents=True)
        shutil.copy(finished / "nora_adapter.safetensors", tmp_path / "library" / "stripemug")
        shutil.copy(EXAMPLES / "stripemug-red" / "0.png", tmp_path / "library" / "stripemug" / "thumbnail.png")
    server = start(tmp_path)
    try:
        for device, (width, height) in SIZES.items():
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            page = context.new_page()
            page.set_default_timeout(120_000)
            visit(page, server.url)
            if device == "desktop":
                page.get_by_label("number input for Pictures").first.fill("4")
                page.get_by_label("number input for Pictures").first.blur()
            page.click("#generate")
            page.wait_for_selector("#generate", state="hidden")
            page.wait_for_selector("#generate:visible")
            for name in TABS:
                open_tab(page, name)
                page.wait_for_timeout(1000)  # pictures fade in
                OUT.mkdir(parents=True, exist_ok=True)
                page.screenshot(path=OUT / f"{name}-{scheme}-{device}.png", full_page=device == "phone")
            context.close()
    finally:
        server.stop()
