"""The page in a real browser: generate, stop, reload, restore, the rack, the library."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from nora_diffusion.pictures import read_settings
from nora_diffusion.ui.tabs.generate_settings import KEPT

from .conftest import LANDMARKS, Server, open_tab, visit, visitor

TAGS = "a sks dog <lora:dog:0.8>"


def fill(page: Any, prompt: str) -> None:
    page.fill("#prompt textarea", prompt)


def settle(page: Any, steps: int = 3) -> None:
    """Open the settings and ask for small pictures."""
    page.get_by_role("button", name="Settings", exact=False).first.click()
    number(page, "Steps", steps)
    page.get_by_label("Width").fill("16")
    page.get_by_label("Height").fill("16")
    page.get_by_label("Height").blur()


def number(page: Any, label: str, value: float) -> None:
    """Write a slider's number."""
    box = page.get_by_label(f"number input for {label}").first
    box.fill(str(value))
    box.press("Enter")
    box.blur()


def generate(page: Any, server: Server) -> Path:
    """Press Generate and wait for the picture."""
    folder = server.library / "pictures"
    before = set(folder.glob("*.png"))
    page.click("#generate")
    wait_until(page, lambda: set(folder.glob("*.png")) != before)
    page.locator("#status").get_by_text(re.compile(r" in [\d.]+ s")).wait_for()
    page.wait_for_selector("#generate:visible")
    (made,) = set(folder.glob("*.png")) - before
    return made


def wait_until(page: Any, true: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something outside the page, which goes on meanwhile."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        page.wait_for_timeout(100)


def test_a_picture_in_two_actions_whose_download_carries_its_settings(
    page: Any, server: Server, tmp_path: Path
) -> None:
    fill(page, "a dog on the beach")  # the first action
    settle(page)
    made = generate(page, server)  # the second one
    assert "1 picture in" in page.inner_text("#status")
    page.locator("#gallery img").first.wait_for()
    page.locator("#gallery button.thumbnail-item, #gallery .thumbnail-item").first.click()
    with page.expect_download() as download:
        page.locator("#gallery").get_by_label(re.compile("download", re.IGNORECASE)).first.click()
    saved = tmp_path / "saved.png"
    download.value.save_as(saved)
    settings = read_settings(saved)
    assert (settings.prompt, settings.steps, settings.width) == ("a dog on the beach", 3, 16)
    assert saved.read_bytes() == made.read_bytes()


def test_ctrl_enter_interrupt_and_skip(page: Any, server: Server) -> None:
    settle(page, 200)
    number(page, "Pictures", 64)  # more than any machine makes before it is interrupted
    page.locator("#seed input").fill("100")
    page.locator("#seed input").blur()
    fill(page, "a dog, skipped")
    page.press("#prompt textarea", "Control+Enter")
    page.get_by_text(re.compile(r"Picture \d+ of 64, step [1-9]\d* of 200")).wait_for()
    page.wait_for_selector("#preview img")
    page.click("#skip")
    folder = server.library / "pictures"
    wait_until(page, lambda: len(list(folder.glob("*.png"))) >= 2 and len(gaps(folder)) == 1)
    page.click("#interrupt")
    page.get_by_text(re.compile(r"Interrupted after \d+ picture")).wait_for()
    assert page.is_visible("#generate") and not page.is_visible("#interrupt")
    before = len(list(folder.glob("*.png")))
    number(page, "Pictures", 1)
    generate(page, server)  # and it goes on
    assert len(list(folder.glob("*.png"))) == before + 1


def gaps(folder: Path) -> set[int]:
    """Seeds of that test's pictures that are missing between the first and the last."""
    settings = [read_settings(file) for file in folder.glob("*.png")]
    seeds = {s.seed for s in settings if s.prompt == "a dog, skipped"}
    return set(range(100, max(seeds, default=99) + 1)) - seeds


def test_settings_and_prompt_survive_a_reload(page: Any, server: Server) -> None:
    settle(page, 7)
    fill(page, "a cat with a hat")
    number(page, "Guidance", 3.5)
    page.wait_for_function("JSON.stringify(localStorage).length > 0")
    visit(page)
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'a cat with a hat'")
    page.get_by_role("button", name="Settings", exact=False).first.click()
    assert page.get_by_label("number input for Steps").first.input_value() == "7"
    assert page.get_by_label("number input for Guidance").first.input_value() == "3.5"


def test_seed_dice_and_reuse(page: Any, server: Server) -> None:
    settle(page)
    fill(page, "a dog")
    made = generate(page, server)
    page.click("#reuse")
    seed = page.locator("#seed input")
    page.wait_for_function("document.querySelector('#seed input').value != '-1'")
    assert read_settings(made).seed == int(seed.input_value())
    page.click("#dice")
    page.wait_for_function("document.querySelector('#seed input').value == '-1'")


def test_the_rack_and_the_prompt_say_the_same(page: Any, server: Server) -> None:
    fill(page, TAGS)
    slider = page.get_by_label("number input for dog: weight")
    slider.wait_for()
    assert slider.input_value() == "0.8"
    slider.fill("0.3")
    slider.press("Enter")
    slider.blur()
    page.wait_for_function("document.querySelector('#prompt textarea').value.includes('<lora:dog:0.3>')")
    page.get_by_label("range slider for dog: weight").press("ArrowRight")
    page.wait_for_function("document.querySelector('#prompt textarea').value.includes('<lora:dog:0.35>')")
    page.click("#add-adapter input")
    page.get_by_role("option", name="hat", exact=True).click()
    page.wait_for_function("document.querySelector('#prompt textarea').value.includes('<lora:hat:0.8>')")
    page.get_by_role("button", name="Remove").first.click()
    page.wait_for_function("!document.querySelector('#prompt textarea').value.includes('dog:')")
    assert page.input_value("#prompt textarea") == "a sks dog <lora:hat:0.8>"


def test_the_text_encoder_has_a_weight_of_its_own(page: Any, server: Server) -> None:
    fill(page, TAGS)
    page.get_by_role("button", name="Text encoder and blocks").locator("visible=true").first.click()
    own = page.get_by_label("number input for Text encoder").locator("visible=true")
    own.fill("0.5")
    own.press("Enter")
    own.blur()
    page.wait_for_function("document.querySelector('#prompt textarea').value.includes('<lora:dog:unet=0.8:te=0.5>')")


def test_stored_settings_that_make_no_sense_are_left_out(page: Any, server: Server) -> None:
    settle(page, 7)
    fill(page, "a cat with a hat")
    page.wait_for_function(f"localStorage.{KEPT}")
    for spoiled in ("not json", '{"steps": 1e9}'):
        page.evaluate("([key, text]) => localStorage.setItem(key, text)", [KEPT, spoiled])
        visit(page)
        page.get_by_role("button", name="Settings", exact=False).first.click()
        assert page.get_by_label("number input for Steps").first.input_value() == "30"  # the first value of this base
    number(page, "Steps", 3)
    page.get_by_label("Width").fill("16")
    page.get_by_label("Height").fill("16")
    page.get_by_label("Height").blur()
    fill(page, "a dog")
    generate(page, server)


def test_the_page_goes_on_after_the_network_was_gone(page: Any, server: Server) -> None:
    settle(page)
    fill(page, "a dog by the sea")
    page.context.set_offline(True)
    page.click("#generate")
    page.wait_for_timeout(1000)
    page.context.set_offline(False)
    visit(page)  # as people do; nothing is lost
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'a dog by the sea'")
    generate(page, server)


def test_an_adapter_that_was_deleted_while_listed(page: Any, server: Server) -> None:
    shutil.copytree(server.library / "hat", server.library / "short-lived")
    page.get_by_role("tab", name="Library").click()
    card = page.locator("[data-name=short-lived]")
    card.wait_for()
    shutil.rmtree(server.library / "short-lived")
    card.click()
    page.get_by_text(re.compile("There is no adapter .short-lived. in the library: refresh it")).wait_for()
    open_tab(page, "mix")
    open_tab(page, "library")
    card.wait_for(state="detached")


def test_only_what_fits_can_be_added(page: Any, server: Server) -> None:
    page.click("#add-adapter input")
    page.get_by_role("option", name="hat", exact=True).wait_for()
    offered = page.get_by_role("option").all_inner_texts()
    assert {"dog", "hat"} <= {text.strip().removeprefix("✓").strip() for text in offered}
    assert not any("stranger" in text or "broken" in text for text in offered)


def test_a_dropped_picture_shows_what_would_change(page: Any, server: Server, tmp_path: Path) -> None:
    settle(page)
    fill(page, TAGS)
    picture = tmp_path / "mine.png"
    shutil.copy(generate(page, server), picture)
    fill(page, "something else")
    page.get_by_role("button", name="Settings from a picture").click()
    page.set_input_files("#drop-picture input[type=file]", picture)
    changes = page.locator("#changes")
    changes.get_by_text("<lora:dog:0.8>").wait_for()
    assert "something else" in changes.inner_text()
    assert page.input_value("#prompt textarea") == "something else"  # nothing is changed yet
    page.click("#apply")
    page.wait_for_function(f"document.querySelector('#prompt textarea').value == {TAGS!r}")
    assert generate(page, server).read_bytes() == picture.read_bytes()  # the same picture again


def test_a_missing_adapter_is_named(page: Any, server: Server, tmp_path: Path) -> None:
    from PIL import Image

    from nora_diffusion.pictures import PictureSettings, save_picture

    digest = "ab" * 32
    adapters = [{"name": "dog", "weight": 0.5, "sha256": digest, "path": ""}]
    settings = PictureSettings("x <b>y</b>", 1, 2, 3.0, 16, 16, adapters=adapters, base="elsewhere")
    picture = save_picture(Image.new("RGB", (16, 16)), tmp_path / "p.png", settings)
    page.get_by_role("button", name="Settings from a picture").click()
    page.set_input_files("#drop-picture input[type=file]", picture)
    page.locator("#changes").get_by_text(f"The adapter dog (SHA-256 {digest}) is not in the library").wait_for()
    text = page.inner_text("#changes")
    assert "x <b>y</b>" in text and "<lora:" not in text and "elsewhere" in text


def test_hostile_names_are_shown_as_text(page: Any, server: Server) -> None:
    page.get_by_role("tab", name="Library").click()
    card = page.locator(".card", has_text="<img src=x onerror=alert(1)>")
    card.wait_for()
    card.click()
    page.locator("#about").get_by_text("<script>alert(2)</script>").wait_for()
    assert page.locator("#cards img[src=x], #about img[src=x], #about script").count() == 0


def test_the_library_says_why_something_cannot_be_used(page: Any, server: Server) -> None:
    page.get_by_role("tab", name="Library").click()
    stranger = page.locator(".card", has_text="stranger")
    stranger.wait_for()
    assert "weights differ" in stranger.inner_text()
    stranger.click()
    page.locator("#about").get_by_text("stranger", exact=True).wait_for()
    assert page.locator("#insert").is_disabled()
    page.locator("#search input, #search textarea").fill("zwx")
    page.wait_for_function("document.querySelectorAll('.card').length == 1")
    page.keyboard.press("Tab")
    page.locator(".card", has_text="hat").focus()
    page.keyboard.press("Enter")  # cards are buttons
    page.locator("#about").get_by_text("zwx", exact=True).wait_for()
    assert re.search(r"[0-9a-f]{64}", page.inner_text("#about").replace("\n", ""))
    page.click("#insert")
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'a zwx hat <lora:hat:1>'")
    page.wait_for_selector("#generate:visible")


def test_a_picture_of_the_adapter_is_chosen_by_a_click(page: Any, server: Server) -> None:
    settle(page)
    fill(page, "a zwx hat <lora:hat:1>")
    made = generate(page, server)
    chosen = server.library / "hat" / "thumbnail.png"
    open_tab(page, "library")
    page.locator("[data-name=hat]").click()
    page.locator("#choose-picture img").first.wait_for()
    page.locator("#choose-picture button").filter(has=page.locator("img")).first.click()
    page.locator("[data-name=hat] img").wait_for()
    assert chosen.read_bytes() == made.read_bytes()
    chosen.unlink()


def test_factors_by_block_come_back_with_a_picture(page: Any, server: Server, tmp_path: Path) -> None:
    settle(page)
    fill(page, TAGS)
    page.get_by_role("button", name="Text encoder and blocks").locator("visible=true").first.click()
    mid = page.get_by_label("number input for Block: mid").locator("visible=true")
    mid.fill("0.5")
    mid.press("Enter")
    mid.blur()
    wait_until(page, lambda: read_settings(generate(page, server)).adapters[0].get("blocks") == {"mid": 0.5})
    picture = tmp_path / "blocks.png"
    shutil.copy(max((server.library / "pictures").glob("*.png"), key=lambda f: f.stat().st_mtime), picture)
    visit(page)
    page.get_by_role("button", name="Settings from a picture").click()
    page.set_input_files("#drop-picture input[type=file]", picture)
    page.locator("#changes table").wait_for()
    page.click("#apply")
    page.wait_for_function(f"document.querySelector('#prompt textarea').value == {TAGS!r}")
    page.get_by_role("button", name="Text encoder and blocks").locator("visible=true").first.click()
    mid = page.get_by_label("number input for Block: mid").locator("visible=true")
    expect(mid).to_have_value("0.5")
    assert page.get_by_label("number input for Block: up").locator("visible=true").input_value() == "1"
    assert generate(page, server).read_bytes() == picture.read_bytes()
    # Taken out and put in again, the adapter is as it was made.
    page.get_by_role("button", name="Remove").first.click()
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'a sks dog'")
    fill(page, TAGS)
    page.get_by_label("number input for dog: weight").wait_for()
    expect(page.get_by_label("number input for Block: mid").first).to_have_value("1")


@pytest.mark.slow
def test_import_export_delete_undo(page: Any, server: Server, library: Path, base: Path, tmp_path: Path) -> None:
    from nora_diffusion import lora, open_pipeline

    from .conftest import save_random

    file = save_random(open_pipeline(base), tmp_path / "new", lora(r=1), trigger="fresh")
    page.get_by_role("tab", name="Library").click()
    page.locator(".card", has_text="dog").first.wait_for()
    named = tmp_path / "imported.safetensors"
    shutil.copy(file, named)
    page.set_input_files("#import input[type=file]", named)
    card = page.locator(".card", has_text="imported")
    card.wait_for()
    card.click()
    page.locator("#about").get_by_text("fresh", exact=True).wait_for()
    page.get_by_role("button", name="Export", exact=True).click()
    page.get_by_text(re.compile("Exported: rank 1, largest error")).wait_for()
    page.click("#delete")
    card.wait_for(state="detached")
    page.click("#undo")
    card.wait_for()
    page.set_input_files("#import input[type=file]", named)
    page.get_by_text(re.compile("in the library already")).wait_for()
    page.locator(".card", has_text="imported").click()
    page.locator("#about").get_by_text("fresh", exact=True).wait_for()
    page.click("#delete")
    card.wait_for(state="detached")


def test_a_mix_becomes_an_adapter_of_the_library(page: Any, server: Server) -> None:
    fill(page, "a dog <lora:dog:0.8> <lora:hat:0.5>")
    page.get_by_role("tab", name="Mix").click()
    page.click("#recipe-take")
    page.wait_for_function("/dog:0.8.*hat:0.5/.test(document.querySelector('#recipe textarea, #recipe input').value)")
    page.get_by_label("Name of the mix").fill("both")
    page.click("#mix")
    report = page.locator("#mix-report")
    report.get_by_text("overlap of dog and hat").wait_for()
    assert "both" in report.inner_text() and "100.0%" in report.inner_text()
    page.get_by_role("tab", name="Library").click()
    page.locator("[data-name=both]").click()
    page.get_by_role("button", name="Export", exact=True).click()
    page.get_by_text(re.compile("Exported: rank")).wait_for()
    shutil.rmtree(server.library / "both")


def test_two_that_change_the_same_are_warned_of(page: Any, server: Server) -> None:
    shutil.copytree(server.library / "dog", server.library / "twin")
    fill(page, "a dog <lora:dog:0.8> <lora:hat:0.5>")
    page.get_by_label("number input for hat: weight").wait_for()
    assert page.locator("#add-adapter-overlap p").count() == 0
    fill(page, "a dog <lora:dog:0.8> <lora:twin:0.5>")
    page.locator("#add-adapter-overlap").get_by_text("dog and twin overlap by 1.00").wait_for()
    shutil.rmtree(server.library / "twin")


@pytest.mark.slow
def test_a_batch_of_many_subjects(page: Any, server: Server) -> None:
    page.get_by_role("tab", name="Mix").click()
    page.fill("#batch textarea", "a dog <lora:dog:1>\na hat <lora:hat:0.8>\na cat")
    before = set((server.library / "pictures").glob("*.png"))
    page.click("#batch-go")
    page.locator("#batch-status").get_by_text(re.compile(r"3 pictures in")).wait_for()
    made = sorted(set((server.library / "pictures").glob("*.png")) - before)
    assert [[a["name"] for a in read_settings(f).adapters] for f in made] == [["dog"], ["hat"], []]


def test_mistakes_are_said_in_a_sentence(page: Any, server: Server) -> None:
    fill(page, "a dog <lora:nobody:1>")
    page.click("#generate")
    page.get_by_text(re.compile("There is no adapter .nobody. in the library")).wait_for()
    assert page.is_visible("#generate")


@pytest.mark.slow
def test_a_second_user_sees_the_queue(page: Any, server: Server, browser: Any) -> None:
    settle(page, 200)
    number(page, "Pictures", 20)
    fill(page, "a dog")
    page.click("#generate")
    page.get_by_text(re.compile(r"step \d+ of 200")).wait_for()
    with visitor(browser) as other:
        visit(other, server.url)
        settle(other)
        fill(other, "a cat")
        other.click("#generate")
        other.get_by_text("You are number 1 in the queue; now running: pictures.").wait_for()
        assert "a dog" not in other.inner_text("#status")  # what others ask for is theirs
        page.close()  # a closed page stops its run and frees the device
        other.get_by_text(re.compile("1 picture in")).wait_for()


def test_nothing_is_fetched_from_elsewhere(browser: Any, server: Server) -> None:
    asked: list[str] = []
    with visitor(browser) as page:
        page.on("request", lambda request: asked.append(request.url))
        visit(page, server.url)
        for name in LANDMARKS:
            open_tab(page, name)
    foreign = [url for url in asked if not url.startswith((server.url, "data:", "blob:"))]
    assert asked and not foreign
