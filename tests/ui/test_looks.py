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
    found: dict[str, list[str]] = {}
    for name in TABS:
        open_tab(page, name)
        found |= {name: lines} if (lines := violations(page)) else {}
    assert not found, "\n".join(f"{tab}: {line}" for tab, lines in found.items() for line in lines)


def test_everything_fits_a_phone(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    visit(page)
    for name in TABS:
        open_tab(page, name)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 390, f"{name} is {wide} pixels wide"
