"""Suggestions below the prompt: the right adapter, one click to add it, and turns with other work on the device."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from playwright.sync_api import expect

from nora_diffusion import UserError, load_base, lora
from nora_diffusion.generation.retrieval.retriever import Retriever
from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.tiny_sd.examples import TRIGGER, instance_prompt, subject_object, training_scenes
from nora_diffusion.ui import engine as engines
from nora_diffusion.ui.config import AppConfig
from nora_diffusion.ui.layout.cards import suggestions
from nora_diffusion.ui.state import App
from nora_diffusion.ui.tabs import suggestions as tab
from nora_diffusion.ui.tabs.suggestions import BUSY, add_handler, suggest_handler

from .conftest import Server, save_random, start, visit, visitor

SLUGS = ("tiger", "poodle", "cyclops-purple", "cyclops-orange", "racer")
PROMPT = "a striped orange cat in the snow"


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of example subjects for the embedded base, untrained: suggestions read their metadata."""
    folder, pipe = tmp_path_factory.mktemp("subjects"), load_base()
    for slug in SLUGS:
        save_random(
            pipe, folder / slug, lora(r=1), trigger=TRIGGER, class_word=subject_object(slug).class_word,
            instance_prompt=instance_prompt(slug), prompts=[scene.caption for scene in training_scenes(slug)],
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def app(subjects: Path, tmp_path_factory: pytest.TempPathFactory) -> App:
    return App(AppConfig(BaseSource(None, "cpu"), library=str(subjects)), tmp_path_factory.mktemp("scratch"))


def shown(app: App, prompt: str, seen: str = "") -> tuple[list[str], str]:
    """The names that are suggested, and what the page keeps."""
    updates = list(suggest_handler(app)(prompt, seen))
    html, kept = updates[-1] if updates else ("", seen)
    return re.findall(r'data-name="([^"]*)"', html), kept


@pytest.fixture(scope="module")
def running(subjects: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("app")
    server = start(folder, "--library", str(subjects))
    yield server
    server.stop()


def test_the_right_adapter_is_one_click_away(browser: Any, running: Server) -> None:
    """Also by keyboard. What is added is not suggested again, and what else the prompt names stays."""
    with visitor(browser) as page:
        visit(page, running.url)
        prompt, line, first = (
            page.locator(s) for s in ("#prompt textarea", "#suggestions", "#suggestions .chip >> nth=0")
        )
        prompt.fill("a striped orange cat and a dog in the snow")
        tiger = line.locator("[data-name=tiger]")
        expect(line.locator(".chip")).to_have_count(0)  # not at each key
        prompt.blur()
        expect(tiger).to_have_text(re.compile(r"^tiger 0\.\d\d$"))
        tiger.click()
        expect(prompt).to_have_value("a striped orange sks cat and a dog in the snow <lora:tiger:1>")
        expect(first).to_have_text(re.compile(r"^poodle 0\.\d\d$"))
        first.focus()
        page.keyboard.press("Enter")
        expect(prompt).to_have_value(
            "a striped orange sks cat and a sks dog in the snow <lora:tiger:1> <lora:poodle:1>"
        )
        expect(line).to_be_hidden()
        expect(page.get_by_label("number input for tiger: weight")).to_be_visible()


def test_suggestions_follow_prompt_and_library(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(app, PROMPT)[0] == ["tiger"] and shown(app, "")[0] == shown(app, "<lora:tiger:1>")[0] == []
    assert shown(app, "a purple monster at night")[0][0] == "cyclops-purple"
    assert shown(app, "a sunset over the sea")[0] == [] and shown(app, f"{PROMPT} <lora:tiger:0.3>")[0] == []
    _, kept = shown(app, PROMPT)
    assert list(suggest_handler(app)(PROMPT, kept)) == []  # nothing is computed again
    assert list(suggest_handler(app)(f"{PROMPT} <lora:ti", kept)) == []
    monkeypatch.setattr(app.library, "entries", list)
    assert shown(app, PROMPT, kept)[0] == []


def test_adapters_of_other_bases_are_not_suggested(base: Path, subjects: Path, tmp_path: Path) -> None:
    app = App(AppConfig(BaseSource(str(base), "cpu"), library=str(subjects)), tmp_path)
    assert tab.candidates(app, set()) == [] and shown(app, PROMPT)[0] == []
    with pytest.raises(UserError, match="tiger cannot be used with this base"):
        add_handler(app)(PROMPT, SimpleNamespace(name="tiger"))


def test_a_busy_device_is_not_waited_for(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tab, "PATIENCE", 0.0)
    with app.device.join("images"):
        ((html, kept),) = suggest_handler(app)(PROMPT, "")
        assert BUSY in html and kept != PROMPT
        assert app.device.busy_with == "images"
    assert shown(app, PROMPT)[0] == ["tiger"] and app.device.busy_with is None


def test_a_large_library_is_read_in_several_turns(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error frees the device."""
    monkeypatch.setenv("NORA_CACHE", "off")
    monkeypatch.setattr(engines, "LEARN_SECONDS", 0.0)
    monkeypatch.setattr(app.engine, "_retriever", None)
    turns: list[str] = []
    join = app.device.join
    monkeypatch.setattr(app.device, "join", lambda label: turns.append(label) or join(label))
    assert shown(app, PROMPT)[0] == ["tiger"] and turns == ["suggestions"] * len(SLUGS)

    def fail(*_: object) -> None:
        raise UserError("out of luck")

    monkeypatch.setattr(Retriever, "learn", fail)
    with pytest.raises(UserError, match="out of luck"):
        shown(app, "a dog")
    assert app.device.busy_with is None


@pytest.mark.parametrize(
    ("prompt", "name", "expected"),
    [
        (PROMPT, "tiger", "a striped orange sks cat in the snow <lora:tiger:1>"),
        ("a beast in the snow", "tiger", "sks cat, a beast in the snow <lora:tiger:1>"),
        ("a sks cat <lora:tiger:0.5>", "tiger", "a sks cat <lora:tiger:0.5>"),
        ("a sks cat and a dog <lora:tiger:0.5>", "poodle", "a sks cat and a sks dog <lora:tiger:0.5> <lora:poodle:1>"),
        ("", "tiger", "a sks cat <lora:tiger:1>"),
    ],
)
def test_what_a_click_adds(app: App, prompt: str, name: str, expected: str) -> None:
    assert add_handler(app)(prompt, SimpleNamespace(name=name)) == expected


def test_an_adapter_that_is_gone(app: App) -> None:
    with pytest.raises(UserError, match=re.escape("no adapter '../x' in the library")):
        add_handler(app)(PROMPT, SimpleNamespace(name="../x"))


def test_names_are_escaped() -> None:
    html = suggestions([("<img src=x onerror=alert(1)>", 0.5), ('"a" b', 0.4)])
    assert "<img" not in html and 'data-name="&quot;a&quot; b"' in html and suggestions([]) == ""
