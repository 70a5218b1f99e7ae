"""Accessibility and narrow screens, tab by tab."""

from __future__ import annotations

from typing import Any

import pytest

from nora_diffusion.ui.shell import TABS

from .conftest import open_tab, visit

pytestmark = pytest.mark.slow

# What Gradio 6.31 itself brings, by rule and the element it is in; everything else must be clean.
GRADIOS_OWN = {"aria-prohibited-attr": ('aria-label="Empty value"',)}  # an empty gallery


def violations(page: Any) -> list[str]:
    """Serious and critical findings of axe, as readable lines."""
    from axe_playwright_python.sync_playwright import Axe

    found = []
    for finding in Axe().run(page).response["violations"]:
        if finding["impact"] not in ("serious", "critical"):
            continue
        for node in finding["nodes"]:
            if not any(part in node["html"] for part in GRADIOS_OWN.get(finding["id"], ())):
                found.append(f"{finding['id']}: {node['html'][:160]}")
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    visit(page)
    for name in TABS:
        open_tab(page, name)
        found = violations(page)
        for _ in range(3):  # what fades in has little contrast meanwhile
            if found:
                page.wait_for_timeout(2000)
                found = violations(page)
        assert not found, f"{name}: " + "\n".join(found)


def test_everything_fits_a_phone(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    visit(page)
    for name in TABS:
        open_tab(page, name)
        page.wait_for_function("document.documentElement.scrollWidth <= 390")
