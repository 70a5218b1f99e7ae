"""The Compare and Inspect tabs in a browser."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import expect

from nora_diffusion import mor, open_pipeline
from nora_diffusion.generation.generate import GenerateConfig, generate
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.ui.comparison import first_row_end

from .conftest import Server, number, open_tab, press, save_random, select, until

AXES = ["seed", "1,2", "weight", "0,1", "none", ""]


def open_compare(page: Any, prompt: str, columns: str, steps: int) -> None:
    open_tab(page, "compare")
    expect(page.locator("#compare-adapter input")).not_to_have_value("")  # the newest is chosen at first
    select(page, "#compare-adapter", "dog")
    field = page.locator("#compare-prompt textarea")
    expect(field).to_have_value("a sks dog")  # the adapter's instance prompt
    field.fill(prompt)
    page.locator("#compare-x-values").locator("input, textarea").fill(columns)
    page.get_by_text("Settings for all cells").click()
    number(page, "Steps", steps)


def compare(page: Any, cells: int) -> None:
    """Click Compare, and wait for the grid and until Compare is available again."""
    press(page.locator("#compare-go"), page.locator("#compare-status"))
    expect(page.locator("#compare-status")).to_have_text(re.compile(rf"^\s*{cells} cells in"))
    expect(page.locator("#compare-go")).to_be_visible()


def test_a_grid_with_downloads_and_a_slider(page: Any, server: Server, base: Path, tmp_path: Path) -> None:
    open_compare(page, "a sks dog", "1,2", 2)
    compare(page, 6)
    page.locator("#compare-grid img").wait_for()
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
    # The last cell is the same image as a single run gives.
    sampling = Sampling(2, cells[-1]["settings"]["guidance"])
    dog = f"{server.library / 'dog'}:1.0"
    config = GenerateConfig(["a sks dog"], sampling, BaseSource(str(base)), [dog], seed=2, out=str(tmp_path))
    alone = generate(config)[0]
    made = server.library / ".grids" / cells[-1]["file"]
    assert Image.open(made).tobytes() == Image.open(alone).tobytes()
    assert str(server.library) not in json.dumps(cells)  # downloads contain no folders of this machine
    # Once more: every cell is cached.
    stamp = made.stat().st_mtime_ns
    compare(page, 6)
    assert made.stat().st_mtime_ns == stamp
    select(page, "#compare-left", "seed = 2, weight = 1")


@pytest.mark.parametrize(
    "change, message",
    [
        ({9: "1" * 5000}, "characters"), ({9: "1..100", 11: "0,1"}, "too many"), ({8: "adapter", 9: "../dog"}, "dog"),
        ({8: "adapter", 9: "/etc/passwd"}, "passwd"), ({8: "color"}, "choices"), ({9: "-1"}, "out of range"),
        ({8: "steps", 9: "1000000000"}, ""), ({10: "weight", 11: "nan"}, "out of range"), ({1: "../dog"}, "choices"),
        ({8: "step", 9: "5"}, "no step"), ({0: "x" * 10**5}, ""), ({8: "adapter", 9: "stranger"}, "cannot be used"),
        ({9: " "}, "has no values"), ({9: "4..1"}, "is reversed: write 1..4"),
        ({2: float("nan"), 10: "none"}, "out of range"), ({5: float("inf")}, ""),
    ],
)  # fmt: skip
def test_invalid_grids_are_refused(server: Server, change: dict[int, Any], message: str) -> None:
    data = ["a dog", "dog", 1.0, 1, 2, 5.0, "", False, *AXES]
    for index, value in change.items():
        data[index] = value
    result = server.call("compare", *data, session=f"compare {sorted(change)}")
    assert not result["success"] and message in str(result["output"]), result


def test_side_by_side_starts_with_the_ends_of_a_row() -> None:
    positions = [(x, y, z) for z in range(2) for y in range(2) for x in range(3)]
    assert first_row_end(positions) == 2 and first_row_end(sorted(positions)) == 8
    assert first_row_end([(0, 0, 0), (0, 1, 0)]) == 1 and first_row_end([(0, 0, 0)]) == 0


def test_inspect_shows_what_an_adapter_changes(page: Any) -> None:
    inspect(page, "dog", intruders=True)
    titles = page.locator("#inspect-plots figcaption")
    for index, title in enumerate(("Update size by block: mean |dW| / |W|", "Largest updates: |dW| / |W|",
                                    "Singular values of the update")):  # fmt: skip
        expect(titles.nth(index)).to_have_text(title)
    page.locator("#inspect-plots summary").click()
    page.locator("#inspect-plots tbody tr").nth(10).wait_for()
    expect(page.locator("#inspect-plots")).to_contain_text("new to the base")


def inspect(page: Any, adapter: str, intruders: bool = False) -> None:
    open_tab(page, "inspect")
    expect(page.locator("#inspect-adapter input")).not_to_have_value("")  # the newest is chosen at first
    select(page, "#inspect-adapter", adapter)
    page.get_by_label("Count intruder dimensions").set_checked(intruders)
    page.locator("#inspect-go").click()
    page.locator("#inspect-status").filter(has_text="layers in").wait_for()


def test_a_late_answer_does_not_overwrite_a_choice(page: Any) -> None:
    box, held = page.locator("#inspect-adapter input"), []
    open_tab(page, "inspect")
    expect(box).not_to_have_value("")
    select(page, "#inspect-adapter", "hat")
    open_tab(page, "mix")
    page.route("**/run/predict", lambda route: held.append(route))
    open_tab(page, "inspect")  # requests the list of adapters
    until(lambda: bool(held), page=page)
    select(page, "#inspect-adapter", "dog")
    for route in held:
        route.continue_()
    page.unroute("**/run/predict")
    open_tab(page, "mix")
    with page.expect_response("**/run/predict"):  # requested only after the last answer arrived
        open_tab(page, "inspect")
    expect(box).to_have_value("dog")


def test_inspecting_unusable_adapters(server: Server) -> None:
    for name in ("nothing", "../dog", None, "", "broken", "stranger"):
        result = server.call("inspect", name, False, session=f"inspect {name}")
        assert not result["success"] or "status bad" in str(result["output"]), result


def test_an_interrupted_grid_is_continued(page: Any, server: Server) -> None:
    shutil.rmtree(server.library / ".grids", ignore_errors=True)
    open_compare(page, "a sks dog, stopped", "1..30", 20)
    status = page.locator("#compare-status")
    page.locator("#compare-go").click()
    expect(status).to_contain_text(re.compile(r"Image ([3-9]|\d\d) of 90"))
    page.locator("#compare-stop").click()
    expect(status).to_contain_text("Interrupted")
    expect(page.locator("#compare-go")).to_be_visible()
    cells = {f: f.stat().st_mtime_ns for f in (server.library / ".grids" / "cells").glob("*.png")}
    assert len(cells) >= 2
    expect(status).to_have_text(
        f"Interrupted with {len(cells)} of 90 cells finished. They are kept: Compare makes only the others."
    )
    page.locator("#compare-x-values").locator("input, textarea").fill("1,2")
    compare(page, 6)
    assert {f: f.stat().st_mtime_ns for f in cells} == cells  # cached cells are not generated again
    assert (
        len(list((server.library / ".grids" / "cells").glob("*.png"))) == len(cells) + 4
    )  # two of the six were cached


def test_a_weight_needs_an_adapter(server: Server) -> None:
    result = server.call("compare", "a dog", "none", 1.0, 1, 2, 5.0, "", False, *AXES, session="weightless")
    assert not result["success"] and "no effect without an adapter" in str(result["output"])


def test_the_routers_of_a_mixture_are_shown(page: Any, server: Server, base: Path, tmp_path: Path) -> None:
    file = save_random(open_pipeline(base), tmp_path / "mixed", mor(r=2, num_experts=3), instance_prompt="a zwx hat")
    shutil.copytree(file.parent, server.library / "mixed", dirs_exist_ok=True)
    try:
        inspect(page, "mixed")
        plot = page.locator("#inspect-plots figure").filter(has_text="Router: mean gate of each expert")
        expect(plot).to_contain_text("expert 3")
    finally:
        shutil.rmtree(server.library / "mixed")
