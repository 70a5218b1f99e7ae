"""The page in a browser: generate, interrupt, reload, restore settings, weight sliders, library, mix."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import expect

from nora_diffusion.generation.image_settings import ImageSettings, read_settings, save_image
from nora_diffusion.generation.tags import parse_tags
from nora_diffusion.ui.request import MAX_IMAGES, MAX_STEPS
from nora_diffusion.ui.tabs.adapter_sliders import TEXT_ENCODER, UNET, weight_script
from nora_diffusion.ui.tabs.generate_settings import STORAGE_KEY

from .conftest import LANDMARKS, LONG, Server, expand, number, open_tab, press, start, until, visit, visitor

TAGS = "a sks dog <lora:dog:0.8>"


def fill(page: Any, prompt: str) -> None:
    page.fill("#prompt textarea", prompt)
    stored(page, prompt=prompt)


def stored(page: Any, **values: Any) -> None:
    """Wait until the page has stored these values, which it does at every change."""
    page.wait_for_function(
        """([key, values]) => {
          const stored = JSON.parse(localStorage.getItem(key) ?? '{}');
          return Object.entries(values).every(([name, value]) => stored[name] === value);
        }""",
        arg=[STORAGE_KEY, values],
    )


def prompt_is(page: Any, prompt: str | re.Pattern[str]) -> None:
    expect(page.locator("#prompt textarea")).to_have_value(prompt)


def open_settings(page: Any) -> None:
    expand(page, "Sampling settings")


def settle(page: Any, steps: int = 3) -> None:
    """Open the settings and choose small images."""
    open_settings(page)
    small(page, steps)


def small(page: Any, steps: int = 3) -> None:
    number(page, "Steps", steps)
    for side in ("Width", "Height"):
        page.get_by_label(side).fill("16")
        page.get_by_label(side).blur()
    stored(page, steps=steps, width=16, height=16)


def generate(page: Any, server: Server) -> Path:
    """Click Generate, and wait for the image and until Generate is available again."""
    folder, status = server.library / "pictures", page.locator("#status")
    before = set(folder.glob("*.png"))
    press(page.locator("#generate"), status)
    expect(status).to_have_text(re.compile(r"^\s*1 image in [\d.]+ s\.\s*$"))
    expect(page.locator("#generate")).to_be_visible()
    (made,) = set(folder.glob("*.png")) - before
    return made


def pick(page: Any, name: str) -> None:
    """Click a card of the library and wait for its details."""
    page.locator(f'[data-name="{name}"]').click()
    expect(page.locator("#about")).to_contain_text(name)
    expect(page.locator(f'[data-name="{name}"]')).to_have_attribute("aria-pressed", "true")


def open_blocks(page: Any) -> None:
    expand(page, "Text encoder and block weights")


def drop(page: Any, image: Path) -> Any:
    """Drop an image with settings. Returns the element that shows the changes."""
    page.get_by_role("button", name="Settings from an image").click()
    page.set_input_files("#drop-image input[type=file]", image)
    return page.locator("#changes")


def test_an_image_in_two_actions_whose_download_contains_its_settings(
    page: Any, server: Server, tmp_path: Path
) -> None:
    fill(page, "a dog on the beach")  # the first action
    settle(page)
    made = generate(page, server)  # the second one
    page.locator("#gallery button.thumbnail-item, #gallery .thumbnail-item").first.click()
    with page.expect_download() as download:
        page.locator("#gallery").get_by_label(re.compile("download", re.IGNORECASE)).first.click()
    saved = tmp_path / "saved.png"
    download.value.save_as(saved)
    settings = read_settings(saved)
    assert (settings.prompt, settings.steps, settings.width) == ("a dog on the beach", 3, 16)
    assert saved.read_bytes() == made.read_bytes()


@pytest.mark.parametrize("width", [1280, 390])
def test_an_image_is_viewed_in_full(page: Any, server: Server, width: int) -> None:
    """A click shows the image in the whole gallery, and full screen in the whole window."""
    page.set_viewport_size({"width": width, "height": 900})
    settle(page)
    fill(page, "a dog")
    generate(page, server)
    page.locator("#gallery .thumbnail-item").first.click()
    view, gallery = page.locator("#gallery .preview"), page.locator("#gallery")

    def covers(width: float, height: float) -> bool:
        box = view.bounding_box()
        return bool(box["width"] > 0.97 * width and box["height"] > 0.97 * height)

    until(lambda: covers(gallery.bounding_box()["width"], 480), page=page)
    image = view.locator(".media-button img")
    assert image.evaluate("image => Math.min(image.clientWidth, image.clientHeight)") > 0.6 * min(width, 480)
    gallery.get_by_label("Fullscreen").first.click()
    until(lambda: covers(width, 900), page=page)


def test_a_typed_weight_counts_with_ctrl_enter(page: Any, server: Server) -> None:
    settle(page)
    fill(page, TAGS)
    weight = page.get_by_label("number input for dog: weight")
    expect(weight).to_have_value("0.8")
    folder = server.library / "pictures"
    for number_typed in (0.3, -1.5):
        before = set(folder.glob("*.png"))
        weight.fill(str(number_typed))
        weight.press("Control+Enter")
        until(lambda before=before: len(set(folder.glob("*.png")) - before) == 1, page=page)  # type: ignore[misc]
        (made,) = set(folder.glob("*.png")) - before
        assert read_settings(made).adapters[0]["weight"] == number_typed
        prompt_is(page, f"a sks dog <lora:dog:{number_typed}>")
        expect(page.locator("#generate")).to_be_visible()
    open_blocks(page)
    held: list[Any] = []
    slow = True  # block weights are stored on the server
    page.route("**/run/predict", lambda route: held.append(route) if slow else route.continue_())
    before = set(folder.glob("*.png"))
    up, mid = (page.get_by_label(f"number input for Block: {name}").locator("visible=true") for name in ("up", "mid"))
    up.fill("0.25")
    up.blur()
    until(lambda: any("0.25" in (route.request.post_data or "") for route in held), page=page)
    mid.fill("0.5")
    mid.press("Control+Enter")  # its weight is sent when the first one is answered
    page.wait_for_timeout(500)
    assert set(folder.glob("*.png")) == before
    slow = False
    for route in held:
        route.continue_()
    until(lambda: len(set(folder.glob("*.png")) - before) == 1, page=page)
    (made,) = set(folder.glob("*.png")) - before
    assert read_settings(made).adapters[0]["blocks"] == {"mid": 0.5, "up": 0.25}


def test_ctrl_enter_interrupt_and_skip(page: Any, server: Server) -> None:
    prompt = f"a dog {time.time_ns() % 10**6}"  # this base reads few tokens
    settle(page, 60)
    number(page, "Number of images", MAX_IMAGES)  # more than any machine generates before the click
    page.locator("#seed input").fill("100")
    page.locator("#seed input").blur()
    fill(page, prompt)
    stored(page, count=MAX_IMAGES, seed=100)
    page.press("#prompt textarea", "Control+Enter")
    page.get_by_text(re.compile(rf"Image \d+ of {MAX_IMAGES}, step [1-9]\d* of 60")).wait_for()
    page.wait_for_selector("#preview img")
    page.click("#skip")
    folder = server.library / "pictures"
    until(lambda: len(gaps(folder, prompt)) == 1, LONG, page)
    page.click("#interrupt")
    page.get_by_text(re.compile(r"Interrupted after \d+ image")).wait_for()
    expect(page.locator("#generate")).to_be_visible()
    expect(page.locator("#interrupt")).to_be_hidden()
    number(page, "Number of images", 1)
    number(page, "Steps", 3)
    stored(page, count=1, steps=3)
    generate(page, server)  # and it still works


def gaps(folder: Path, prompt: str) -> set[int]:
    """Missing seeds between the first and the last image with this prompt."""
    settings = [read_settings(file) for file in folder.glob("*.png")]
    seeds = {s.seed for s in settings if s.prompt == prompt}
    return set(range(100, max(seeds, default=99) + 1)) - seeds


def test_settings_and_prompt_survive_a_reload(page: Any, server: Server) -> None:
    settle(page, 7)
    fill(page, "a cat with a hat")
    number(page, "CFG scale", 3.5)
    stored(page, prompt="a cat with a hat", steps=7, guidance=3.5)
    visit(page)
    prompt_is(page, "a cat with a hat")
    open_settings(page)
    expect(page.get_by_label("number input for Steps").first).to_have_value("7")
    expect(page.get_by_label("number input for CFG scale").first).to_have_value("3.5")


def test_seed_dice_and_reuse(page: Any, server: Server) -> None:
    settle(page)
    fill(page, "a dog")
    made = generate(page, server)
    seed = page.locator("#seed input")
    page.click("#reuse")
    expect(seed).to_have_value(str(read_settings(made).seed))
    page.click("#dice")
    expect(seed).to_have_value("-1")


def test_sliders_and_prompt_agree(page: Any, server: Server) -> None:
    fill(page, TAGS)
    expect(page.get_by_label("number input for dog: weight")).to_have_value("0.8")
    number(page, "dog: weight", 0.3)
    prompt_is(page, "a sks dog <lora:dog:0.3>")
    page.get_by_label("range slider for dog: weight").press("ArrowRight")
    prompt_is(page, "a sks dog <lora:dog:0.35>")
    page.click("#add-adapter input")
    page.get_by_role("option", name="hat", exact=True).click()
    prompt_is(page, "a sks dog <lora:dog:0.35> <lora:hat:0.8>")
    expect(page.get_by_label("number input for hat: weight")).to_have_value("0.8")
    settle(page)
    page.get_by_role("button", name="Remove").locator("visible=true").first.click()
    prompt_is(page, "a sks dog <lora:hat:0.8>")


@pytest.mark.parametrize(("tab", "field"), [("generate", "#prompt"), ("mix", "#recipe")])
def test_a_restored_tag_shows_no_inner_field(page: Any, tab: str, field: str) -> None:
    open_tab(page, tab)
    text, weight = page.locator(field).locator("textarea, input"), page.get_by_label("number input for hat: weight")
    weight = weight.locator("visible=true")
    for prompt, shown in (("a hat <lora:hat:0.7>", 1), ("a hat", 0), ("a hat <lora:hat:0.7>", 1)):
        text.fill(prompt)
        expect(weight).to_have_count(shown)
    expect(weight).to_have_value("0.7")
    expect(page.get_by_label("Textbox").locator("visible=true")).to_have_count(0)
    slider = page.get_by_label("range slider for hat: weight").locator("visible=true")
    slider.press("ArrowRight")
    expect(text).to_have_value("a hat <lora:hat:0.75>")
    page.get_by_role("button", name="Remove", exact=True).locator("visible=true").click()
    expect(text).to_have_value(re.compile("^a hat ?$"))


def test_the_text_encoder_has_its_own_weight(page: Any, server: Server) -> None:
    fill(page, TAGS)
    open_blocks(page)
    number(page, "Text encoder", 0.5)
    prompt_is(page, "a sks dog <lora:dog:unet=0.8:te=0.5>")


def test_a_slider_keeps_what_is_typed_in_the_meantime(page: Any) -> None:
    fill(page, TAGS)
    expect(page.get_by_label("number input for dog: weight")).to_have_value("0.8")
    held: list[Any] = []
    page.route("**/run/predict", lambda route: held.append(route))  # a slow server
    page.get_by_label("range slider for dog: weight").press("ArrowLeft")
    page.locator("#prompt textarea").press("End")
    page.keyboard.type(" in the snow")
    prompt_is(page, "a sks dog <lora:dog:0.75> in the snow")
    until(lambda: bool(held), page=page)
    for route in held:
        route.continue_()
    page.unroute("**/run/predict")
    fill(page, "a sks dog <lora:dog:0.75> in the snow <lora:hat:0.5>")
    expect(page.get_by_label("number input for hat: weight")).to_have_value("0.5")
    prompt_is(page, "a sks dog <lora:dog:0.75> in the snow <lora:hat:0.5>")
    expect(page.get_by_label("number input for dog: weight")).to_have_value("0.75")


def test_a_weight_beyond_the_limits_of_the_slider(page: Any) -> None:
    fill(page, "a sks dog <lora:dog:unet=3:te=-4>")
    weight = page.get_by_label("number input for dog: weight")
    expect(weight).to_have_value("3")
    page.get_by_label("range slider for dog: weight").press("ArrowLeft")
    prompt_is(page, "a sks dog <lora:dog:unet=2.95:te=-4>")
    weight.fill("5")
    weight.blur()
    prompt_is(page, "a sks dog <lora:dog:unet=5:te=-4>")
    expect(page.get_by_label("range slider for dog: weight")).to_have_attribute("max", "5")
    fill(page, "a sks dog <lora:dog:unet=0.5:te=-4> <lora:hat:0.3>")
    expect(weight).to_have_value("0.5")
    expect(page.get_by_label("number input for hat: weight")).to_have_value("0.3")


def test_the_sliders_write_tags_as_python_does(page: Any) -> None:
    def changed(change: str, tag: str, value: float) -> str:
        prompt = [f"a {tag} <lora:hat:0.50>", "dog", value]
        result = page.evaluate(f"(values) => ({weight_script(change)})(...values)", prompt)
        return str(result).removeprefix("a ").removesuffix(" <lora:hat:0.50>")

    for written in ("", ":0.8", ":0.6:0.8", ":te=0.6", ":unet=0.8", ":te=0.6: unet = .5", ":0.7:unet=+2.", ":1e-1:0.1"):
        for value in (-1, 0, 0.35, 0.8, 3, 100):
            tag = f"< LORA:dog{written} >"
            old = parse_tags(tag)[1][0]
            together = replace(old, unet=value, te=value if old.te == old.unet else old.te)
            assert changed(UNET, tag, value) == str(together)
            assert changed(TEXT_ENCODER, tag, value) == str(replace(old, te=value))
    assert changed(UNET, "<lora:dog:1>", -500) == "<lora:dog:-100>"
    for tag in ("<lora:other:0.5>", "<lora:dog:>", "<lora:dog:0x1>", "<lora:dog:unet=>", "<lora:dog:0.5"):
        assert changed(UNET, tag, 0.3) == tag


def test_invalid_stored_settings_are_ignored(page: Any, server: Server) -> None:
    settle(page, 7)
    fill(page, "a cat with a hat")
    for invalid in ("not json", '{"steps": 1e9}', '{"steps": "7", "prompt": 7}', "[7]"):
        page.goto(f"{server.url}/config")  # the same origin, without the script that stores settings
        page.evaluate("([key, text]) => localStorage.setItem(key, text)", [STORAGE_KEY, invalid])
        visit(page, server.url)
        open_settings(page)
        expect(page.get_by_label("number input for Steps").first).to_have_value("30")  # the default of this base
    small(page)
    fill(page, "a dog")
    generate(page, server)


def test_the_page_survives_a_lost_network(page: Any, server: Server) -> None:
    settle(page)
    fill(page, "a dog by the sea")
    page.context.set_offline(True)
    with page.expect_event("requestfailed"):
        page.click("#generate")
    page.goto("about:blank")  # the page could reload itself at any moment once the network is back
    page.context.set_offline(False)
    visit(page, server.url)  # as users do; nothing is lost
    prompt_is(page, "a dog by the sea")
    generate(page, server)


@contextmanager
def copied(server: Server, source: str, name: str) -> Iterator[Path]:
    """A temporary copy of an adapter in the library, under another name."""
    folder = server.library / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(server.library / source, folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_an_adapter_that_was_deleted_while_listed(page: Any, server: Server) -> None:
    with copied(server, "hat", "short-lived") as folder:
        open_tab(page, "library")
        card = page.locator("[data-name=short-lived]")
        card.wait_for()
        shutil.rmtree(folder)
        card.click()
        page.get_by_text(
            re.compile("There is no adapter .short-lived. in the library: remove its tag, or restore")
        ).wait_for()
        open_tab(page, "mix")
        open_tab(page, "library")
        card.wait_for(state="detached")


def test_every_deletion_can_be_undone_after_a_reload(page: Any, server: Server) -> None:
    with copied(server, "hat", "first-gone"), copied(server, "hat", "then-gone"):
        for name in ("first-gone", "then-gone"):
            open_tab(page, "library")
            pick(page, name)
            page.click("#delete")
            page.locator(f"[data-name={name}]").wait_for(state="detached")
        visit(page)
        open_tab(page, "library")
        for name in ("then-gone", "first-gone"):
            expect(page.locator("#undo")).to_have_text(f"Undo delete: restore {name}")
            page.click("#undo")
            page.locator(f"[data-name={name}]").wait_for()


def test_the_hint_goes_when_the_first_adapter_arrives(browser: Any, base: Path, library: Path, tmp_path: Path) -> None:
    empty = start(tmp_path, "--base", str(base))
    try:
        with visitor(browser) as page:
            visit(page, empty.url)
            expect(page.locator("#add-adapter")).to_contain_text("No adapters yet")
            open_tab(page, "library")
            imported = shutil.copy(library / "hat" / "nora_adapter.safetensors", tmp_path / "hat.safetensors")
            page.set_input_files("#import input[type=file]", imported)
            pick(page, "hat")
            page.click("#insert")
            expect(page.get_by_label("number input for hat: weight")).to_have_value("1")
            expect(page.locator("#add-adapter")).not_to_contain_text("No adapters yet")
            open_tab(page, "inspect")
            expect(page.locator("#inspect-adapter")).not_to_contain_text("No adapters yet")
    finally:
        empty.stop()


def test_only_usable_adapters_can_be_added(page: Any, server: Server) -> None:
    page.click("#add-adapter input")
    for name in ("dog", "hat"):
        page.get_by_role("option", name=name, exact=True).wait_for()
    offered = page.get_by_role("option").all_inner_texts()
    assert not any("stranger" in text or "broken" in text for text in offered)


def test_a_dropped_image_shows_the_changes(page: Any, server: Server, tmp_path: Path) -> None:
    settle(page)
    fill(page, TAGS)
    image = tmp_path / "mine.png"
    shutil.copy(generate(page, server), image)
    fill(page, "something else")
    changes = drop(page, image)
    expect(changes).to_contain_text("<lora:dog:0.8>")
    expect(changes).to_contain_text("something else")
    prompt_is(page, "something else")  # nothing is changed yet
    page.click("#apply")
    prompt_is(page, TAGS)
    stored(page, prompt=TAGS, seed=read_settings(image).seed)
    assert generate(page, server).read_bytes() == image.read_bytes()  # the same image again


def test_a_refused_image_clears_the_changes_of_the_last(page: Any, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    settings = ImageSettings(prompt="a fox", seed=3, steps=2, guidance=2.0, width=16, height=16)
    save_image(Image.new("RGB", (16, 16)), tmp_path / "good.png", settings)
    changes = drop(page, tmp_path / "good.png")
    expect(changes).to_contain_text("a fox")
    page.click("#apply")
    expect(changes).to_have_text("Applied.")
    page.set_input_files("#drop-image input[type=file]", tmp_path / "plain.png")
    expect(changes.locator(".bad")).to_contain_text("plain.png")
    expect(changes).not_to_contain_text("Applied")


def test_a_missing_adapter_is_named(page: Any, server: Server, tmp_path: Path) -> None:
    digest = "ab" * 32
    adapters = [{"name": "dog", "weight": 0.5, "sha256": digest, "path": ""}]
    settings = ImageSettings("x <b>y</b>", 1, 2, 3.0, 16, 16, adapters=adapters, base="elsewhere")
    changes = drop(page, save_image(Image.new("RGB", (16, 16)), tmp_path / "p.png", settings))
    expect(changes).to_contain_text(f"The adapter dog (SHA-256 {digest}) is not in the library")
    expect(changes).to_contain_text("x <b>y</b>")
    expect(changes).to_contain_text("elsewhere")
    expect(changes).not_to_contain_text("<lora:")


def test_hostile_names_are_shown_as_text(page: Any, server: Server) -> None:
    open_tab(page, "library")
    card = page.locator(".card", has_text="<img src=x onerror=alert(1)>")
    card.click()
    page.locator("#about").get_by_text("<script>alert(2)</script>").wait_for()
    expect(card).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#cards img[src=x], #about img[src=x], #about script")).to_have_count(0)


def test_the_library_says_why_an_adapter_cannot_be_used(page: Any, server: Server) -> None:
    open_tab(page, "library")
    expect(page.locator(".card", has_text="stranger")).to_contain_text("different weights")
    pick(page, "stranger")
    expect(page.locator("#insert")).to_be_disabled()
    page.locator("#search input, #search textarea").fill("zwx")
    expect(page.locator(".card")).to_have_count(1)
    page.locator(".card", has_text="hat").press("Enter")  # cards are buttons
    page.locator("#about").get_by_text("zwx", exact=True).wait_for()
    expect(page.locator("#about")).to_contain_text(re.compile("[0-9a-f]{64}"))
    page.click("#insert")
    prompt_is(page, "a zwx hat <lora:hat:1>")
    expect(page.locator("#generate")).to_be_visible()


def test_a_thumbnail_is_chosen_by_a_click(page: Any, server: Server) -> None:
    settle(page)
    fill(page, "a zwx hat <lora:hat:1>")
    with copied(server, "hat", "hat-with-a-picture") as folder:  # the same file, so images of one are images of both
        made = generate(page, server)
        open_tab(page, "library")
        pick(page, folder.name)
        page.locator("#choose-thumbnail button").filter(has=page.locator("img")).first.click()
        page.locator(f"[data-name={folder.name}] img").wait_for()
        assert (folder / "thumbnail.png").read_bytes() == made.read_bytes()


def test_block_weights_are_restored_from_an_image(page: Any, server: Server, tmp_path: Path) -> None:
    settle(page)
    fill(page, TAGS)
    open_blocks(page)
    with page.expect_response(re.compile("/run/predict")):  # only stored on the server, so the page shows no change
        number(page, "Block: mid", 0.5)
    image = tmp_path / "blocks.png"
    shutil.copy(generate(page, server), image)
    assert read_settings(image).adapters[0].get("blocks") == {"mid": 0.5}
    visit(page)
    drop(page, image).locator("table").wait_for()
    page.click("#apply")
    prompt_is(page, TAGS)
    stored(page, prompt=TAGS, seed=read_settings(image).seed)
    open_blocks(page)
    expect(page.get_by_label("number input for Block: mid").locator("visible=true")).to_have_value("0.5")
    expect(page.get_by_label("number input for Block: up").locator("visible=true")).to_have_value("1")
    assert generate(page, server).read_bytes() == image.read_bytes()
    # Removed and added again, the adapter has no block weights.
    page.get_by_role("button", name="Remove").locator("visible=true").first.click()
    prompt_is(page, "a sks dog")
    fill(page, TAGS)
    page.get_by_label("number input for dog: weight").wait_for()
    expect(page.get_by_label("number input for Block: mid").first).to_have_value("1")


@pytest.mark.slow
def test_import_export_delete_undo(page: Any, server: Server, library: Path, base: Path, tmp_path: Path) -> None:
    from nora_diffusion import lora, open_pipeline

    from .conftest import save_random

    file = save_random(open_pipeline(base), tmp_path / "new", lora(r=1), trigger="fresh")
    open_tab(page, "library")
    named = tmp_path / "imported.safetensors"
    shutil.copy(file, named)
    page.set_input_files("#import input[type=file]", named)
    page.get_by_text("Imported: imported", exact=True).wait_for()  # Gradio shows no titles of its toasts
    card = page.locator(".card", has_text="imported")
    card.wait_for()
    pick(page, "imported")
    page.locator("#about").get_by_text("fresh", exact=True).wait_for()
    page.get_by_role("button", name="Export", exact=True).click()
    page.get_by_text(re.compile("Exported: rank 1, max error")).wait_for()
    page.click("#delete")
    card.wait_for(state="detached")
    page.click("#undo")
    card.wait_for()
    page.set_input_files("#import input[type=file]", named)
    page.get_by_text(re.compile("already in the library")).wait_for()
    pick(page, "imported")
    page.locator("#about").get_by_text("fresh", exact=True).wait_for()
    page.click("#delete")
    card.wait_for(state="detached")


def test_a_mix_is_saved_to_the_library(page: Any, server: Server) -> None:
    shutil.rmtree(server.library / "both", ignore_errors=True)
    fill(page, "a dog <lora:dog:0.8> <lora:hat:0.5>")
    open_tab(page, "mix")
    page.click("#recipe-take")
    expect(page.locator("#recipe").locator("textarea, input")).to_have_value(re.compile("dog:0.8.*hat:0.5"))
    page.get_by_label("Name of the mix").fill("both")
    page.click("#mix")
    report = page.locator("#mix-report")
    for text in ("overlap of dog and hat", "both", "100.0%"):
        expect(report).to_contain_text(text)
    try:
        open_tab(page, "library")
        pick(page, "both")
        page.get_by_role("button", name="Export", exact=True).click()
        page.get_by_text(re.compile("Exported: rank")).wait_for()
    finally:
        shutil.rmtree(server.library / "both")


def test_overlapping_adapters_are_warned_about(page: Any, server: Server) -> None:
    warning = page.locator("#add-adapter-overlap")
    with copied(server, "dog", "twin"):
        fill(page, "a dog <lora:dog:0.8> <lora:twin:0.5>")
        expect(warning).to_contain_text("dog and twin overlap by 1.00")
        fill(page, "a dog <lora:dog:0.8> <lora:hat:0.5>")
        expect(warning.locator("p")).to_have_count(0)


@pytest.mark.slow
def test_a_batch_with_different_adapters(page: Any, server: Server) -> None:
    open_tab(page, "mix")
    page.fill("#batch textarea", "a dog <lora:dog:1>\na hat <lora:hat:0.8>\na cat")
    before = set((server.library / "pictures").glob("*.png"))
    page.click("#batch-go")
    page.locator("#batch-status").get_by_text(re.compile(r"3 images in")).wait_for()
    captions = page.locator("#batch-gallery .caption-label")
    expect(captions).to_have_text([re.compile(text) for text in ("1. a dog", "2. a hat", "3. a cat")])
    made = sorted(set((server.library / "pictures").glob("*.png")) - before)
    assert [[a["name"] for a in read_settings(f).adapters] for f in made] == [["dog"], ["hat"], []]


def test_errors_are_shown_as_a_sentence(page: Any, server: Server, tmp_path: Path) -> None:
    plain = tmp_path / "plain.png"
    Image.new("RGB", (16, 16)).save(plain)
    drop(page, plain)
    page.get_by_text("Plain.png has no settings").wait_for()
    fill(page, "a dog <lora:nobody:1>")
    page.click("#generate")
    page.get_by_text(re.compile("There is no adapter .nobody. in the library")).wait_for()
    expect(page.locator("#generate")).to_be_visible()


@pytest.mark.slow
def test_a_second_user_sees_the_queue(page: Any, server: Server, browser: Any) -> None:
    settle(page, MAX_STEPS)
    number(page, "Number of images", MAX_IMAGES)  # longer than another page needs to open
    fill(page, "a dog")
    stored(page, count=MAX_IMAGES)
    page.click("#generate")
    page.get_by_text(re.compile(rf"step \d+ of {MAX_STEPS}")).wait_for()
    with visitor(browser) as other:
        visit(other, server.url)
        settle(other)
        fill(other, "a cat")
        other.click("#generate")
        # Prompts of other users are private: the queue shows only the kind of work.
        expect(other.locator("#status")).to_have_text("You are number 1 in the queue; now running: images.")
        page.close()  # a closed page stops its run and frees the device
        expect(other.locator("#status")).to_have_text(re.compile(r"^\s*1 image in"))


def test_nothing_is_loaded_from_other_hosts(browser: Any, server: Server) -> None:
    requested: list[str] = []
    with visitor(browser) as page:
        page.on("request", lambda request: requested.append(request.url))
        visit(page, server.url)
        for name in LANDMARKS:
            open_tab(page, name)
    foreign = [url for url in requested if not url.startswith((server.url, "data:", "blob:"))]
    assert requested and not foreign
