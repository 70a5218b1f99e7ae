"""The Train tab in a browser: photos with reasons for rejects, a run that a reload and a new tab find again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from factories import write_photos

from nora_diffusion import inspect_adapter
from nora_diffusion.captions import read_captions
from nora_diffusion.ui.photos import with_captions

from .conftest import Server, visit, visitor

LONG = 180_000
FORGED = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}


def open_tab(page: Any) -> Any:
    page.get_by_role("tab", name="Train").click()
    page.wait_for_selector("#train-name")
    return page


def status(page: Any, pattern: str) -> str:
    """Wait for a status and return it."""
    place = page.locator("#train-status").filter(has_text=re.compile(pattern))
    place.wait_for(timeout=LONG)
    return str(place.inner_text())


def fill(page: Any, name: str, **settings: Any) -> None:
    page.get_by_label("Name").fill(name)
    page.get_by_label("What it is").fill("dog")
    page.get_by_text("All settings", exact=True).click()
    small = {"rank": 4, "inner_rank": 2, "basis": "svd", "train_batch_size": 1, "sample_steps": 1, **settings}
    page.locator("#train-extra textarea").fill("\n".join(f"{key}: {value}" for key, value in small.items()))


def drop(page: Any, *files: Path) -> None:
    page.set_input_files("#train-photos input[type=file]", [str(file) for file in files])
    page.locator("#train-report p").first.wait_for()


def test_photos_are_shown_as_trained_and_rejects_have_reasons(page: Any, tmp_path: Path) -> None:
    open_tab(page)
    write_photos(tmp_path, 2)
    (tmp_path / "fake.png").write_text("<svg onload='alert(1)'/>")
    drop(page, *sorted(tmp_path.glob("*.png")))
    page.locator("#train-prepared img").nth(1).wait_for()
    said = page.locator("#train-report").inner_text()
    assert "2 photos will be trained on" in said and "fake.png is no JPEG, PNG or WEBP" in said
    page.get_by_role("button", name="Check").click()
    page.get_by_text("give one word, for example").wait_for()  # what it is, is not said yet
    page.get_by_label("What it is").fill("dog")
    page.get_by_role("button", name="Check").click()
    page.locator("#train-findings p").first.wait_for()
    said = page.locator("#train-findings").inner_text()
    assert "There are only 2 photos: with 3 to 10" in said  # the trainer's own words
    assert "fake.png is no JPEG" in page.locator("#train-report").inner_text()


def test_captions_are_dropped_beside_their_photos(page: Any, tmp_path: Path) -> None:
    open_tab(page)
    write_photos(tmp_path, 2)
    first, _ = sorted(tmp_path.glob("*.png"))
    first.with_suffix(".txt").write_text("a sks dog in <b>snow</b>")
    (tmp_path / "alone.txt").write_text("x")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    drop(page, *sorted(tmp_path.iterdir()))
    said = page.locator("#train-report").inner_text()
    assert "2 photos will be trained on" in said and "1 with a caption of its own" in said
    assert "alone.txt belongs to no photo" in said
    page.locator("#train-prepared").get_by_text("a sks dog in <b>snow</b>").first.wait_for()


def test_captions_lie_where_the_trainer_looks(tmp_path: Path) -> None:
    photos = sorted(write_photos(tmp_path / "a", 1).glob("*")) + sorted(write_photos(tmp_path / "b", 2).glob("*"))
    stem = photos[0].stem
    files = {name: tmp_path / name for name in (f"{stem}.txt", "long.txt", "latin.txt")}
    files[f"{stem}.txt"].write_text("\ufeffa dog\n in snow", encoding="utf-8")
    (tmp_path / "b" / "latin.png").write_bytes(photos[0].read_bytes())
    (tmp_path / "b" / "long.png").write_bytes(photos[0].read_bytes())
    files["latin.txt"].write_bytes(b"\xff\xfe\xfa")
    files["long.txt"].write_text("a" * 5000)
    photos += [tmp_path / "b" / "latin.png", tmp_path / "b" / "long.png"]
    (tmp_path / "placed").mkdir()
    placed, faults = with_captions(photos, list(files.values()), tmp_path / "placed")
    assert [p.read_bytes() for p in placed] == [p.read_bytes() for p in photos]
    assert read_captions(placed, "plain", sidecars=True) == ["a dog in snow", "a dog in snow", *["plain"] * 3]
    assert "longer than" in faults[0] and "UTF-8" in faults[1] and len(faults) == 2


def test_an_example_subject_takes_one_click(page: Any) -> None:
    open_tab(page)
    page.locator("#train-examples button").filter(has_text="tiger").click()
    page.locator("#train-prepared img").nth(5).wait_for()
    assert page.get_by_label("Name").input_value() == "tiger"
    assert page.get_by_label("What it is").input_value() == "cat"


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("train_photos", [[{**FORGED}]], ""),
        ("train_photos", [[{**FORGED, "url": "file:///etc/passwd"}]], ""),
        ("train_start", ["../x", None, "Fast", "sks", "dog", "nora", 5, 0, False, False, ""], "no photo"),
        ("train_start", ["x", None, "Fast", "sks", "dog", "nora", 5, 0, False, False, "output_dir: /tmp"], "app's own"),
        ("train_start", ["x", None, "Fast", "sks", "dog", "pickle", 5, 0, False, False, ""], ""),
        ("train_stop", ["../../library"], ""),
        ("train_remove", ["/etc"], ""),
        ("train_resume", ["nothing"], ""),
    ],
)  # fmt: skip
def test_scripts_get_no_further_than_pages(server: Server, name: str, data: list[Any], message: str) -> None:
    before = sorted(p for p in server.library.rglob("*") if ".jobs" in p.parts)
    answer = server.call(name, *data, session=f"attack {name}")
    assert not answer["success"], answer
    assert message in str(answer["output"]).replace("&#x27;", "'")
    assert sorted(p for p in server.library.rglob("*") if ".jobs" in p.parts) == before


@pytest.mark.slow
def test_a_training_from_drop_to_library(page: Any, server: Server, browser: Any, tmp_path: Path) -> None:
    open_tab(page)
    drop(page, *sorted(write_photos(tmp_path, 3).glob("*.png")))
    fill(page, "my-dog", max_train_steps=4, validation_steps=2)
    page.locator("#train-start").click()
    status(page, "Waiting|Starting|Training")
    # A reload and a new tab of another browser find it again.
    page.reload()
    open_tab(page)
    with visitor(browser) as second:
        visit(second, server.url)
        open_tab(second)
        for tab in (page, second):
            assert "library as 'my-dog'" in status(tab, "Done")
            tab.locator("#train-samples img").nth(5).wait_for()
            curve = tab.locator("#train-curves svg").first
            assert curve.get_attribute("aria-label", timeout=1000).startswith("Loss, loss over")
    assert inspect_adapter(server.library / "my-dog").step == 4
    page.get_by_role("tab", name="Library").click()
    page.locator("[data-name=my-dog]").wait_for()
    # From the finished training to a picture: one click leads to a prompt that calls it.
    page.get_by_role("tab", name="Train").click()
    page.click("#train-use")
    page.wait_for_selector("#generate:visible")
    assert page.input_value("#prompt textarea") == "a sks dog <lora:my-dog:1>"


@pytest.mark.slow
def test_stop_saves_and_resume_names_the_step(page: Any, server: Server, tmp_path: Path) -> None:
    open_tab(page)
    drop(page, *sorted(write_photos(tmp_path, 3).glob("*.png")))
    fill(page, "stopped-dog", max_train_steps=3000, lr_scheduler="constant", validation_steps=9000)
    page.locator("#train-start").click()
    status(page, r"Training, step \d")
    page.get_by_role("button", name="Stop and save").click()
    said = status(page, r"Stopped, step \d+ of 3000")
    step = int(re.search(r"step (\d+)", said)[1])  # type: ignore[index]
    assert f"go on from step {step}" in said
    page.get_by_role("button", name=f"Resume from step {step}").click()
    status(page, r"Training, step \d")
    page.get_by_role("button", name="Stop and save").click()
    later = int(re.search(r"step (\d+)", status(page, r"Stopped, step"))[1])  # type: ignore[index]
    assert later > step and not (server.library / "stopped-dog").exists()
    page.get_by_role("button", name="Remove this training").click()
    page.locator("#train-runs input").and_(page.locator(":not([value*='stopped-dog'])")).wait_for()
