"""The Compare and Inspect tabs in a browser."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nora_diffusion import mor, open_pipeline
from nora_diffusion.generation import GenerateConfig, generate

from .conftest import Server, save_random, visit

AXES = ["seed", "1,2", "weight", "0,1", "none", ""]


def choose(page: Any, field: str, value: str) -> None:
    page.locator(f"{field} input").click()
    page.get_by_role("option", name=value, exact=True).click()


def open_compare(page: Any, prompt: str) -> None:
    page.get_by_role("tab", name="Compare").click()
    page.wait_for_function("document.querySelector('#compare-adapter input').value != ''")  # the newest is chosen
    choose(page, "#compare-adapter", "dog")
    page.locator("#compare-prompt textarea").fill(prompt)


def compare(page: Any) -> None:
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator("#compare-status").filter(has_text="cells in").wait_for(timeout=120_000)


def test_a_grid_with_downloads_and_a_slider(page: Any, server: Server, base: Path, tmp_path: Path) -> None:
    open_compare(page, "a sks dog")
    page.locator("#compare-x-values").locator("input, textarea").fill("1,2")
    page.get_by_text("Settings of all cells").click()
    page.get_by_label("number input for Steps").locator("visible=true").fill("2")
    compare(page)
    page.locator("#compare-sheet img").wait_for()
    page.locator("#compare-slider img").nth(1).wait_for()
    with page.expect_download() as download:
        page.locator("#compare-json").click()
    cells = json.loads(Path(download.value.path()).read_text())["cells"]
    assert [(c["settings"]["seed"], c["settings"]["adapters"][0]["weight"]) for c in cells] == [
        (seed, weight) for weight in (0, 0.5, 1) for seed in (1, 2)
    ]  # fmt: skip
    with page.expect_download() as download:
        page.locator("#compare-png").click()
    assert download.value.suggested_filename == "grid.png"
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")
    # The last cell is the picture that the single run makes.
    alone = generate(GenerateConfig(["a sks dog"], str(base), [f"{server.library / 'dog'}:1.0"], seed=2, steps=2,
                                    guidance=cells[-1]["settings"]["guidance"], out=str(tmp_path)))[0]  # fmt: skip
    made = server.library / ".grids" / cells[-1]["file"]
    assert Image.open(made).tobytes() == Image.open(alone).tobytes()
    assert str(server.library) not in json.dumps(cells)  # a download says nothing of this machine's folders
    # Once more: every cell is there already.
    stamp = made.stat().st_mtime_ns
    compare(page)
    assert made.stat().st_mtime_ns == stamp
    choose(page, "#compare-left", "seed = 2, weight = 1")


@pytest.mark.parametrize(
    "change, message",
    [
        ({9: "1" * 5000}, "characters"), ({9: "1..100", 11: "0,1"}, "too many"), ({8: "adapter", 9: "../dog"}, "dog"),
        ({8: "adapter", 9: "/etc/passwd"}, "passwd"), ({8: "colour"}, "choices"), ({9: "-1"}, "out of range"),
        ({8: "steps", 9: "1000000000"}, ""), ({10: "weight", 11: "nan"}, "out of range"), ({1: "../dog"}, "choices"),
        ({8: "step", 9: "5"}, "no step"), ({0: "x" * 10**5}, ""), ({8: "adapter", 9: "stranger"}, "cannot be used"),
        ({2: float("nan"), 10: "none"}, "out of range"), ({5: float("inf")}, ""),
    ],
)  # fmt: skip
def test_absurd_grids_are_refused(server: Server, change: dict[int, Any], message: str) -> None:
    data = ["a dog", "dog", 1.0, 1, 2, 5.0, "", False, *AXES]
    for place, value in change.items():
        data[place] = value
    answer = server.call("compare", *data, session=f"compare {sorted(change)}")
    assert not answer["success"] and message in str(answer["output"]), answer


def test_inspect_shows_what_an_adapter_changes(page: Any) -> None:
    page.get_by_role("tab", name="Inspect").click()
    choose(page, "#inspect-adapter", "dog")
    page.get_by_label("Count intruder dimensions").check()
    page.get_by_role("button", name="Inspect", exact=True).click()
    page.locator("#inspect-status").filter(has_text="layers in").wait_for(timeout=120_000)
    names = page.locator("#inspect-plots figcaption").all_inner_texts()
    assert names[:3] == ["Size of the update by part of the model", "Layers that change most",
                         "Singular values of the update"]  # fmt: skip
    page.locator("#inspect-plots summary").click()
    assert page.locator("#inspect-plots tbody tr").count() > 10
    assert "new to the base" in page.locator("#inspect-plots").inner_text()


def test_inspecting_what_is_not_there(server: Server) -> None:
    for name in ("nothing", "../dog", None, "broken", "stranger"):
        answer = server.call("inspect", name, False, session=f"inspect {name}")
        said = str(answer["output"])
        assert not answer["success"] or "status bad" in said, answer


def test_a_stopped_grid_goes_on_where_it_was(page: Any, server: Server) -> None:
    open_compare(page, "a sks dog, stopped")
    page.locator("#compare-x-values").locator("input, textarea").fill("1..4")
    page.get_by_text("Settings of all cells").click()
    page.get_by_label("number input for Steps").locator("visible=true").fill("20")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator("#compare-status").filter(has_text="Picture 3 of 12").wait_for(timeout=120_000)
    page.locator("#compare-stop").click()
    page.locator("#compare-status").filter(has_text="Interrupted").wait_for()
    cells = {f: f.stat().st_mtime_ns for f in (server.library / ".grids" / "cells").glob("*.png")}
    compare(page)
    page.locator("#compare-status").filter(has_text="12 cells in").wait_for()
    assert {f: f.stat().st_mtime_ns for f in cells} == cells  # what was there is not made again


def test_a_weight_needs_an_adapter(server: Server) -> None:
    answer = server.call("compare", "a dog", "none", 1.0, 1, 2, 5.0, "", False, *AXES, session="weightless")
    assert not answer["success"] and "changes nothing without an adapter" in str(answer["output"])


def test_the_routers_of_a_mixture_are_shown(page: Any, server: Server, base: Path, tmp_path: Path) -> None:
    file = save_random(open_pipeline(base), tmp_path / "mixed", mor(r=2, num_experts=3), instance_prompt="a zwx hat")
    shutil.copytree(file.parent, server.library / "mixed")
    try:
        visit(page)
        page.get_by_role("tab", name="Inspect").click()
        choose(page, "#inspect-adapter", "mixed")
        page.get_by_role("button", name="Inspect", exact=True).click()
        plot = page.locator("#inspect-plots figure").filter(has_text="Router: mean gate of each expert")
        plot.wait_for(timeout=120_000)
        assert "expert 3" in plot.inner_html()
    finally:
        shutil.rmtree(server.library / "mixed")
