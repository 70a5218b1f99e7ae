"""The whole story on the embedded base: learn two subjects, mix them, compare, export, reload, restart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect
from safetensors import safe_open

from nora_diffusion import inspect_adapter
from nora_diffusion.pictures import read_settings
from nora_diffusion.ui.jobs import Jobs

from .conftest import ROOT, Server, open_tab, start, visitor
from .conftest import visit as open_page

TIGER = ROOT / "examples" / "subjects" / "tiger"
LONG = 400_000
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
    folder = running.library / ".jobs"
    jobs = Jobs(folder, running.library, folder / "device.lock")
    for job in jobs.list():
        if job.running:  # it would outlive the test as it outlives the app
            jobs.stop(job.id)
    if running.process.poll() is None:
        running.stop()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    with visitor(browser) as page:
        yield page


def visit(page: Any, server: Server, tab: str) -> None:
    open_page(page, server.url)
    open_tab(page, tab.lower())


def learn(page: Any, name: str) -> None:
    page.locator("#train-prepared img").nth(4).wait_for()
    page.locator("#train-start").click()
    page.locator("#train-status").filter(has_text=re.compile(f"library as '{name}'|Failed|Killed")).wait_for(
        timeout=LONG
    )
    assert f"library as '{name}'" in page.locator("#train-status").inner_text()


@pytest.mark.slow
def test_the_story(app: Server, tab: Any, tmp_path: Path) -> None:
    # Five photos of an example subject, dropped; then another subject by one click.
    visit(tab, app, "Train")
    tab.set_input_files("#train-photos input[type=file]", [str(TIGER / f"{n}.png") for n in range(5)])
    tab.locator("#train-name textarea, #train-name input").fill("tiger")
    tab.get_by_label("What it is").fill("cat")
    tab.get_by_text("All settings", exact=True).click()
    tab.locator("#train-extra textarea").fill(SMALL)
    learn(tab, "tiger")
    assert tab.locator("#train-curves svg").count() == 2  # loss; subject and prompt fidelity of the samples
    tab.locator("#train-examples button").filter(has_text="tractor").click()
    tab.locator("#train-report").filter(has_text="6 photos").wait_for()
    learn(tab, "tractor")
    hashes = {name: inspect_adapter(app.library / name).sha256 for name in ("tiger", "tractor")}

    # Both in one picture.
    tab.get_by_role("tab", name="Generate").click()
    tab.fill("#prompt textarea", "a sks cat on the beach <lora:tiger:0.8> <lora:tractor:0.4>")
    tab.click("#generate")
    tab.locator("#status").get_by_text(re.compile(r"1 picture in")).wait_for(timeout=LONG)
    (picture,) = (app.library / "pictures").glob("*.png")
    settings = read_settings(picture)
    assert {a["name"]: (a["weight"], a["sha256"]) for a in settings.adapters} == {
        "tiger": (0.8, hashes["tiger"]), "tractor": (0.4, hashes["tractor"]),
    }  # fmt: skip

    # Compare them, with scores by the judge that the base brings.
    tab.get_by_role("tab", name="Compare").click()
    tab.wait_for_function("document.querySelector('#compare-adapter input').value != ''")
    tab.locator("#compare-prompt textarea").fill("a sks cat on the beach")
    for axis, name, values in (("x", "adapter", "none, tiger, tractor"), ("y", "seed", "1")):
        tab.locator(f"#compare-{axis} input").click()
        tab.get_by_role("option", name=name, exact=True).click()
        field = tab.locator(f"#compare-{axis}-values").locator("input, textarea")
        if name == "adapter":  # the suggested values come first
            expect(field).to_have_value(re.compile("tractor"))
        field.fill(values)
    tab.get_by_role("button", name="Compare", exact=True).click()
    tab.locator("#compare-status").filter(has_text="3 cells in").wait_for(timeout=LONG)
    with tab.expect_download() as download:
        tab.locator("#compare-json").click()
    assert '"prompt": 0.' in Path(download.value.path()).read_text()

    # Export to a plain LoRA.
    tab.get_by_role("tab", name="Library").click()
    tab.locator("[data-name=tiger]").click()
    tab.get_by_role("button", name="Export", exact=True).click()
    with tab.expect_download() as download:
        tab.locator("a[download$='.safetensors'], .file-preview a").first.click(timeout=LONG)
    with safe_open(download.value.path(), "pt") as exported:
        assert all("lora" in key for key in exported.keys())  # noqa: SIM118

    # Reload: the runs are there. Restart the server: so they are, and the library too.
    visit(tab, app, "Train")
    tab.locator("#train-status").filter(has_text="library as 'tractor'").wait_for()
    assert app.stop() == 0
    again = start(tmp_path / "second", "--library", str(app.library))
    try:
        visit(tab, again, "Train")
        tab.locator("#train-status").filter(has_text="library as 'tractor'").wait_for()
        tab.get_by_role("tab", name="Library").click()
        tab.locator("[data-name=tractor]").wait_for()
        assert {name: inspect_adapter(app.library / name).sha256 for name in hashes} == hashes
    finally:
        again.stop()
