"""The Train tab in a browser: photos and reasons for rejects, a run that survives a reload and shows in a new tab."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from factories import write_photos
from playwright.sync_api import expect

from nora_diffusion import UserError, inspect_adapter
from nora_diffusion.data.caption_files import read_captions
from nora_diffusion.ui.jobs.images import with_captions
from nora_diffusion.ui.jobs.jobs import Jobs
from nora_diffusion.ui.tabs.generate_settings import STORAGE_KEY
from nora_diffusion.ui.tabs.train import name_warnings

from .conftest import LONG, Server, end_trainings, expand, jobs_of, open_tab, until, visit, visitor

FORGED = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}


@pytest.fixture
def name(server: Server) -> Iterator[str]:
    """An unused name in the library. Its trainings are stopped and removed after the test."""
    yield "my-dog"
    end_trainings(server)
    shutil.rmtree(server.library / "my-dog", ignore_errors=True)


def status(page: Any, pattern: str) -> str:
    """Wait for a status and return it."""
    line = page.locator("#train-status")
    expect(line).to_contain_text(re.compile(pattern), timeout=1000 * LONG)
    return str(line.inner_text())


def fill(page: Any, name: str, **settings: Any) -> None:
    page.get_by_label("Name").fill(name)
    page.get_by_label("Class word").fill("dog")
    expand(page, "Advanced settings")
    small = {"rank": 4, "inner_rank": 2, "basis": "svd", "train_batch_size": 1, "sample_steps": 1, **settings}
    page.locator("#train-extra textarea").fill("\n".join(f"{key}: {value}" for key, value in small.items()))


def drop(page: Any, *files: Path) -> None:
    page.set_input_files("#train-photos input[type=file]", [str(file) for file in files])
    page.locator("#train-report p").first.wait_for()


def test_photos_are_shown_as_trained_and_rejects_have_reasons(page: Any, tmp_path: Path) -> None:
    open_tab(page, "train")
    write_photos(tmp_path, 2)
    (tmp_path / "fake.png").write_text("<svg onload='alert(1)'/>")
    drop(page, *sorted(tmp_path.glob("*.png")))
    page.locator("#train-prepared img").nth(1).wait_for()
    report = page.locator("#train-report")
    expect(report).to_contain_text("2 photos will be used")
    expect(report).to_contain_text("fake.png is not a JPEG, PNG, WEBP or HEIC")
    page.get_by_role("button", name="Check").click()
    page.get_by_text("enter one word, for example").wait_for()  # the class word is empty
    page.get_by_label("Class word").fill("dog")
    page.get_by_role("button", name="Check").click()
    # a warning of the trainer
    expect(page.locator("#train-findings")).to_contain_text("There are only 2 photos: use 3 to 10")
    expect(report).to_contain_text("fake.png is not a JPEG")
    page.get_by_label("Name").fill("Rex the dog!")
    page.get_by_role("button", name="Check").click()
    expect(page.locator("#train-findings")).to_contain_text("The adapter will be named 'Rex-the-dog'")


def test_the_form_survives_a_reload(page: Any) -> None:
    open_tab(page, "train")
    fill(page, "rex")
    page.get_by_label("Fast").check()
    page.get_by_label("Train the text encoder too").check()
    page.wait_for_function(
        "(key) => JSON.parse(localStorage.getItem(key) ?? '{}').encoder === true", arg=f"{STORAGE_KEY}Train"
    )
    visit(page)
    open_tab(page, "train")
    expect(page.get_by_label("Name")).to_have_value("rex")
    expect(page.get_by_label("Class word")).to_have_value("dog")
    expect(page.get_by_label("Fast")).to_be_checked()
    expand(page, "Advanced settings")
    expect(page.get_by_label("Train the text encoder too")).to_be_checked()
    expect(page.locator("#train-extra textarea")).to_have_value(re.compile("inner_rank: 2"))
    # Stored values that are not valid, for example from an older release, are ignored.
    invalid = '{"preset": "Slow", "method": 3, "name": "rex", "steps": -1}'
    page.evaluate("([key, text]) => localStorage.setItem(key, text)", [f"{STORAGE_KEY}Train", invalid])
    visit(page)
    open_tab(page, "train")
    expect(page.get_by_label("Name")).to_have_value("rex")
    expect(page.get_by_label("Balanced")).to_be_checked()


def test_captions_are_dropped_with_their_photos(page: Any, tmp_path: Path) -> None:
    open_tab(page, "train")
    write_photos(tmp_path, 2)
    first, _ = sorted(tmp_path.glob("*.png"))
    first.with_suffix(".txt").write_text("a sks dog in <b>snow</b>")
    (tmp_path / "alone.txt").write_text("x")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    drop(page, *sorted(tmp_path.iterdir()))
    for text in ("2 photos will be used", "captions: 1", "alone.txt belongs to no photo"):
        expect(page.locator("#train-report")).to_contain_text(text)
    page.locator("#train-prepared").get_by_text("a sks dog in <b>snow</b>").first.wait_for()
    page.get_by_label("Class word").fill("dog")
    page.get_by_role("button", name="Check").click()
    page.locator("#train-findings p").first.wait_for()
    expect(page.locator("#train-report")).to_contain_text("alone.txt belongs to no photo")


def test_an_invalid_name_is_changed_with_a_warning() -> None:
    assert name_warnings(" my-dog ") == []
    assert "'Rex-the-dog'" in name_warnings("Rex the dog!")[0] and "'adapter'" in name_warnings("")[0]


def test_captions_are_copied_where_the_trainer_looks(tmp_path: Path) -> None:
    photos = sorted(write_photos(tmp_path / "a", 1).glob("*")) + sorted(write_photos(tmp_path / "b", 2).glob("*"))
    stem = photos[0].stem
    files = {name: tmp_path / name for name in (f"{stem}.txt", "long.txt", "latin.txt")}
    files[f"{stem}.txt"].write_text("\ufeffa dog\n in snow", encoding="utf-8")
    (tmp_path / "b" / "latin.png").write_bytes(photos[0].read_bytes())
    (tmp_path / "b" / "long.png").write_bytes(photos[0].read_bytes())
    files["latin.txt"].write_bytes(b"\xff\xfe\xfa")
    files["long.txt"].write_text("a" * 5000)
    photos += [tmp_path / "b" / "latin.png", tmp_path / "b" / "long.png"]
    (tmp_path / "copies").mkdir()
    copies, errors = with_captions(photos, list(files.values()), tmp_path / "copies")
    assert [p.read_bytes() for p in copies] == [p.read_bytes() for p in photos]
    texts = [read_captions([copy], "plain", sidecars=True).texts[0] for copy in copies]
    assert texts == ["a dog in snow", "a dog in snow", *["plain"] * 3]
    assert "longer than" in errors[0] and "UTF-8" in errors[1] and len(errors) == 2


def test_captions_are_matched_as_in_the_trainer(tmp_path: Path) -> None:
    photos = sorted(write_photos(tmp_path, 4).glob("*"))
    names = {"0.TXT": "zero", "1.caption": "one", "2.png.txt": "two", "2.txt": "other", "3.txt": ""}
    for name, text in names.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "copies").mkdir()
    copies, errors = with_captions(photos, [tmp_path / name for name in names], tmp_path / "copies")
    assert [read_captions([copy], "plain", sidecars=True).texts[0] for copy in copies] == [
        "zero",
        "one",
        "two",
        "plain",
    ]
    assert errors == ["2.txt is left out: 2.png.txt is already the caption of 2.png"]


def test_an_example_subject_takes_one_click(page: Any) -> None:
    open_tab(page, "train")
    page.locator("#train-examples button").filter(has_text="tiger").click()
    page.locator("#train-prepared img").nth(5).wait_for()
    expect(page.get_by_label("Name")).to_have_value("tiger")
    expect(page.get_by_label("Class word")).to_have_value("cat")
    expect(page.get_by_label("Trigger word")).to_have_value("ohwx")  # an adapter in the library has sks
    page.locator("#train-prepared").get_by_text("a ohwx cat in the grass").first.wait_for()


def started(name: str = "x", extra: str = "", **changes: str) -> list[Any]:
    """The values of a form that is started."""
    chosen = {"method": "nora", "strategy": "none", "rank_allocation": "uniform", "optimizer": "adamw", **changes}
    return [name, None, "Fast", "sks", "dog", *chosen.values(), 5, 0, False, False, extra]


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("train_photos", [[{**FORGED}]], ""),
        ("train_photos", [[{**FORGED, "url": "file:///etc/passwd"}]], ""),
        ("train_start", started("../x"), "no photos"),
        ("train_start", started(extra="judge: x"), "app sets"),
        ("train_start", started(method="pickle"), "not in the list"),
        ("train_start", started(strategy="pickle"), "not in the list"),
        ("train_start", started(rank_allocation="pickle"), "not in the list"),
        ("train_start", started(optimizer="pickle"), "not in the list"),
        ("train_stop", ["../../library"], ""),
        ("train_remove", ["/etc"], ""),
        ("train_resume", ["nothing"], ""),
    ],
)  # fmt: skip
def test_scripts_cannot_bypass_the_page(server: Server, name: str, data: list[Any], message: str) -> None:
    before = sorted(p for p in server.library.rglob("*") if ".jobs" in p.parts)
    result = server.call(name, *data, session=f"attack {name}")
    assert not result["success"], result
    assert message in str(result["output"]).replace("&#x27;", "'")
    assert sorted(p for p in server.library.rglob("*") if ".jobs" in p.parts) == before


@pytest.mark.slow
def test_a_training_from_drop_to_library(page: Any, server: Server, browser: Any, name: str, tmp_path: Path) -> None:
    open_tab(page, "train")
    drop(page, *sorted(write_photos(tmp_path, 3).glob("*.png")))
    fill(page, name, max_train_steps=4, validation_steps=2)
    page.locator("#train-start").click()
    status(page, "Waiting|Starting|Training|Saving|Done")
    # The run is there after a reload, and for a new visitor.
    visit(page)
    open_tab(page, "train")
    with visitor(browser) as second:
        visit(second, server.url)
        open_tab(second, "train")
        for tab in (page, second):
            assert "library as 'my-dog'" in status(tab, "Done")
            tab.locator("#train-samples img").nth(5).wait_for()
            curve = tab.locator("#train-curves svg").first
            expect(curve).to_have_attribute("aria-label", re.compile("^Loss, loss over"))
    assert inspect_adapter(server.library / "my-dog").step == 4
    open_tab(page, "library")
    page.locator("[data-name=my-dog]").wait_for()
    # One click leads from the finished training to a prompt with its adapter.
    open_tab(page, "train")
    page.click("#train-use")
    expect(page.locator("#generate")).to_be_visible()
    expect(page.locator("#prompt textarea")).to_have_value("a ohwx dog <lora:my-dog:1>")


@pytest.mark.slow
def test_stop_saves_and_resume_names_the_step(page: Any, server: Server, name: str, tmp_path: Path) -> None:
    open_tab(page, "train")
    drop(page, *sorted(write_photos(tmp_path, 3).glob("*.png")))
    fill(page, name, max_train_steps=50_000, lr_scheduler="constant", validation_steps=90_000)
    page.locator("#train-start").click()
    status(page, r"Training, step \d")
    page.get_by_role("button", name="Stop and save").click()
    text = status(page, r"Stopped, step \d+ of 50000")
    step = int(re.search(r"step (\d+)", text)[1])  # type: ignore[index]
    assert f"resumed from step {step}" in text
    page.get_by_role("button", name=f"Resume from step {step}").click()
    status(page, r"Training, step \d")
    page.get_by_role("button", name="Stop and save").click()
    later = int(re.search(r"step (\d+)", status(page, r"Stopped, step"))[1])  # type: ignore[index]
    assert later > step and not (server.library / name).exists()
    page.get_by_role("button", name="Delete this run").click()
    expect(page.locator("#train-resume")).to_be_hidden()
    until(lambda: name not in [job.name for job in jobs_of(server).list()], page=page)


def test_a_refused_resume_refreshes_the_page(page: Any, server: Server) -> None:
    folder = jobs_of(server).root / "20260101-000000-abcdef"
    checkpoint = folder / "run" / "checkpoints" / "step-7"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (folder / "job.json").write_text('{"name": "old-dog"}')
    (folder / "exit.json").write_text('{"code": 143, "message": ""}')
    try:
        open_tab(page, "train")
        resume = page.get_by_role("button", name="Resume from step 7")
        resume.wait_for()
        shutil.rmtree(checkpoint)  # as another page could do
        resume.click()
        page.get_by_text(re.compile("has no checkpoint to resume from")).wait_for()
        expect(resume).to_be_hidden()
    finally:
        shutil.rmtree(folder)


def test_a_job_removed_in_the_meantime_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs(tmp_path, tmp_path, tmp_path / "lock")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "job.json").write_text("{}")

    def removed(_: Path) -> None:
        raise UserError("there is no such training")

    monkeypatch.setattr("nora_diffusion.ui.jobs.jobs.read_job", removed)
    assert jobs.list() == []
