"""Accessibility and narrow screens, tab by tab."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nora_diffusion.composition.mixing import MixReport
from nora_diffusion.formats.adapter_info import AdapterInfo
from nora_diffusion.ui.layout.cards import cards
from nora_diffusion.ui.layout.theme import CSS
from nora_diffusion.ui.shell import TABS
from nora_diffusion.ui.tabs.mix import describe

from .conftest import open_tab, visit, visitor

pytestmark = pytest.mark.slow

# Violations of Gradio 6.31 itself: rule, and a part of the HTML of the element.
GRADIO_VIOLATIONS = {"aria-prohibited-attr": ('aria-label="Empty value"',)}  # an empty gallery


def violations(page: Any) -> list[str]:
    """Serious and critical violations that axe finds, one line each."""
    from axe_playwright_python.sync_playwright import Axe

    found = []
    for finding in Axe().run(page).response["violations"]:
        if finding["impact"] not in ("serious", "critical"):
            continue
        for node in finding["nodes"]:
            if not any(part in node["html"] for part in GRADIO_VIOLATIONS.get(finding["id"], ())):
                found.append(f"{finding['id']}: {node['html'][:160]}")
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_accessibility_violations(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    visit(page)
    for name in TABS:
        open_tab(page, name)
        found = violations(page)
        for _ in range(3):  # contrast is low while an element fades in
            if found:
                page.wait_for_timeout(2000)
                found = violations(page)
        assert not found, f"{name}: " + "\n".join(found)


OWN_CLASSES_ON_OTHERS = """
() => {
  const rules = [...document.styleSheets].flatMap((sheet) => [...sheet.cssRules]);
  const own = rules.filter((rule) => rule.selectorText?.endsWith('.html-container') && rule.cssRules?.length > 20);
  const names = own.flatMap((rule) => [...rule.cssText.matchAll(/\\.([a-z]+)[ {:.>,]/g)].map((match) => match[1]));
  const others = [...new Set(names)].flatMap((name) => [...document.querySelectorAll('.' + name)])
    .filter((element) => /svelte-/.test(element.className));
  return [own.length, others.length, others.filter((element) => element.closest('.html-container')).length];
}
"""


def test_styles_of_our_html_leave_other_elements_alone(page: Any) -> None:
    """Gradio's components have classes such as ``preview`` and ``empty`` as well: there our styles broke its view."""
    for name in TABS:
        open_tab(page, name)
    blocks, others, styled = page.evaluate(OWN_CLASSES_ON_OTHERS)
    assert blocks and others and not styled


def test_every_tab_fits_a_phone(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    visit(page)
    for name in TABS:
        open_tab(page, name)
        page.wait_for_function("document.documentElement.scrollWidth <= 390")


LONG_NAME = "a-very-long-name-of-an-adapter-that-somebody-gave-it-in-a-hurry1"


def test_long_names_leave_room_for_the_values(browser: Any) -> None:
    report = MixReport("mix", "cat", 8, 1, 1.0, 0.0, {(LONG_NAME, "hat"): 0.25}, [], AdapterInfo({}))
    with visitor(browser) as page:
        page.set_content(
            f"<style>{CSS}</style><div class='html-container' style='width: 480px'>{describe(report)}</div>"
        )
        cell, table = page.locator(".facts td").last.bounding_box(), page.locator(".facts").bounding_box()
    assert cell["width"] > 90 and cell["x"] + cell["width"] <= table["x"] + table["width"] + 1


def test_neighboring_cards_are_aligned(browser: Any) -> None:
    entries = [
        SimpleNamespace(name=name, info=None, scores=dict, thumbnail=lambda: None, stamp=("", 0, 0))
        for name in ("dog", LONG_NAME)
    ]
    with visitor(browser) as page:
        page.set_content(
            f"<style>{CSS}</style><div class='html-container' style='width: 300px'>{cards(entries, [None, None])}</div>"
        )  # type: ignore[arg-type]
        (one, two), name = (p.bounding_box() for p in page.locator(".none").all()), page.locator(".card b").last
        assert one["y"] == two["y"]
        assert name.bounding_box()["height"] <= 3.5 * page.locator(".card b").first.bounding_box()["height"]
