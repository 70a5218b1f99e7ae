"""An end-to-end test on the embedded base: train two subjects, generate with both, compare, export, restart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect
from safetensors import safe_open

from nora_diffusion import inspect_adapter
from nora_diffusion.generation.image_settings import read_settings

from .conftest import LONG, ROOT, Server, end_trainings, expand, open_tab, select, start, visitor
from .conftest import visit as open_page

TIGER = ROOT / "examples" / "subjects" / "tiger"
SMALL = """basis: svd
rank: 4
inner_rank: 2
target_modules: [attn]
max_train_steps: 3
train_batch_size: 1
validation_steps: 3
sample_steps: 2
checkpointing_steps: 3"""


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Server]:
    running = start(tmp_path / "first")
    yield running
    end_trainings(running)
    if running.process.poll() is None:
        running.stop()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    with visitor(browser) as page:
        yield page


def visit(page: Any, server: Server, tab: str) -> None:
    open_page(page, server.url)
    open_tab(page, tab.lower())


def train(page: Any, name: str) -> None:
    page.locator("#train-prepared img").nth(4).wait_for()
    page.locator("#train-start").click()
    status = page.locator("#train-status")
    expect(status).to_contain_text(re.compile(f"library as '{name}'|Failed|Killed"), timeout=1000 * LONG)
    expect(status).to_contain_text(f"library as '{name}'", timeout=1000)  # the status does not change any more


@pytest.mark.slow
def test_the_story(app: Server, tab: Any, tmp_path: Path) -> None:
    # Drop five photos of an example subject, then choose another subject by a click.
    visit(tab, app, "Train")
    tab.set_input_files("#train-photos input[type=file]", [str(TIGER / f"{n}.png") for n in range(5)])
    tab.locator("#train-name textarea, #train-name input").fill("tiger")
    tab.get_by_label("Class word").fill("cat")
    expand(tab, "Advanced settings")
    tab.locator("#train-extra textarea").fill(SMALL)
    train(tab, "tiger")
    expect(tab.locator("#train-curves svg")).to_have_count(2)  # loss; subject and prompt fidelity of the samples
    tab.locator("#train-examples button").filter(has_text="tractor").click()
    tab.locator("#train-report").filter(has_text="6 photos").wait_for()
    train(tab, "tractor")
    assert len({inspect_adapter(app.library / name).trigger for name in ("tiger", "tractor")}) == 2
    hashes = {name: inspect_adapter(app.library / name).sha256 for name in ("tiger", "tractor")}

    # Both in one image.
    open_tab(tab, "generate")
    tab.fill("#prompt textarea", "a sks cat on the beach <lora:tiger:0.8> <lora:tractor:0.4>")
    tab.click("#generate")
    expect(tab.locator("#status")).to_contain_text("1 image in")
    (image,) = (app.library / "pictures").glob("*.png")
    settings = read_settings(image)
    assert {a["name"]: (a["weight"], a["sha256"]) for a in settings.adapters} == {
        "tiger": (0.8, hashes["tiger"]), "tractor": (0.4, hashes["tractor"]),
    }  # fmt: skip

    # Compare them, with scores by the judge of the embedded base.
    open_tab(tab, "compare")
    expect(tab.locator("#compare-adapter input")).not_to_have_value("")
    tab.locator("#compare-prompt textarea").fill("a sks cat on the beach")
    for axis, name, values in (("x", "adapter", "none, tiger, tractor"), ("y", "seed", "1")):
        select(tab, f"#compare-{axis}", name)
        field = tab.locator(f"#compare-{axis}-values").locator("input, textarea")
        expect(field).to_have_value(re.compile("tractor" if name == "adapter" else "1..4"))  # suggested values
        field.fill(values)
    tab.locator("#compare-go").click()
    expect(tab.locator("#compare-status")).to_contain_text("3 cells in")
    with tab.expect_download() as download:
        tab.locator("#compare-json").click()
    assert '"prompt": 0.' in Path(download.value.path()).read_text()

    # Export to a plain LoRA.
    open_tab(tab, "library")
    tab.locator("[data-name=tiger]").click()
    tab.get_by_role("button", name="Export", exact=True).click()
    link = tab.locator("a[download$='.safetensors'], .file-preview a").first
    link.wait_for()
    with tab.expect_download() as download:
        link.click()
    with safe_open(download.value.path(), "pt") as exported:
        assert all("lora" in key for key in exported.keys())  # noqa: SIM118

    # The runs survive a reload, and a restart of the server, as does the library.
    visit(tab, app, "Train")
    tab.locator("#train-status").filter(has_text="library as 'tractor'").wait_for()
    assert app.stop() == 0
    again = start(tmp_path / "second", "--library", str(app.library))
    try:
        visit(tab, again, "Train")
        tab.locator("#train-status").filter(has_text="library as 'tractor'").wait_for()
        open_tab(tab, "library")
        tab.locator("[data-name=tractor]").wait_for()
        assert {name: inspect_adapter(app.library / name).sha256 for name in hashes} == hashes
    finally:
        again.stop()
