"""Adding an adapter to a prompt: its trigger words are added, and nothing that the user wrote is lost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nora_diffusion.formats.adapter_info import AdapterInfo
from nora_diffusion.ui.tabs.adapter_sliders import insert_handler
from nora_diffusion.ui.tabs.compare import trigger_handler
from nora_diffusion.ui.tabs.generate_settings import FIRST_PROMPT

INFOS = {
    "dog": AdapterInfo({}, trigger="sks", class_word="dog", instance_prompt="a sks dog"),
    "cat": AdapterInfo({}, trigger="sks", class_word="cat", instance_prompt="a sks cat"),
    "hat": AdapterInfo({}, trigger="zwx", instance_prompt="a zwx hat"),
    "both": AdapterInfo({}, trigger="sks, zwx", class_word="dog, hat", instance_prompt="a sks dog and a zwx hat"),
    "style": AdapterInfo({}),
}


@pytest.fixture
def app() -> Any:
    entries = {name: SimpleNamespace(info=info, tag=name, error="") for name, info in INFOS.items()}
    return SimpleNamespace(
        engine=SimpleNamespace(is_embedded=True, steps=20, guidance=5.0), problem=lambda entry: None,
        library=SimpleNamespace(entry=entries.get, entries=lambda: list(entries.values())),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "adapter", "expected"),
    [
        ("", "dog", "a sks dog <lora:dog:1>"),
        (FIRST_PROMPT, "dog", "a sks dog <lora:dog:1>"),
        ("a Dog by the sea", "dog", "a sks Dog by the sea <lora:dog:1>"),
        ("by the sea", "dog", "sks dog, by the sea <lora:dog:1>"),
        ("photo of sks, by the sea", "dog", "photo of sks, by the sea <lora:dog:1>"),
        ("by the sea <lora:sks:0.5>", "dog", "sks dog, by the sea <lora:sks:0.5> <lora:dog:1>"),
        ("<lora:dog:0.8> a sks dog, running", "dog", "<lora:dog:0.8> a sks dog, running"),
        ("a sks dog <lora:dog:0.8>", "hat", "zwx, a sks dog <lora:dog:0.8> <lora:hat:1>"),
        ("a sks dog", "hat", "a zwx hat <lora:hat:1>"),
        ("a sks cat", "dog", "a sks dog <lora:dog:1>"),
        ("sks with a zwx hat", "both", "sks with a zwx hat <lora:both:1>"),
        ("a sks dog running", "both", "zwx, a sks dog running <lora:both:1>"),
        (FIRST_PROMPT, "style", f"{FIRST_PROMPT} <lora:style:1>"),
    ],
)
def test_trigger_words_are_added_and_the_prompt_is_kept(app: Any, prompt: str, adapter: str, expected: str) -> None:
    assert insert_handler(app)(prompt, adapter)[0] == expected


def test_compare_adds_trigger_words_and_keeps_the_prompt(app: Any) -> None:
    add_trigger = trigger_handler(app)
    assert add_trigger("a dog by the sea", "dog") == "a sks dog by the sea"
    assert add_trigger("a zwx hat", "dog") == "a sks dog"  # the prompt of the adapter before
    for prompt, adapter in (("sks, by the sea", "dog"), ("by the sea", "none"), ("by the sea", None)):
        assert add_trigger(prompt, adapter).get("__type__") == "update" and "value" not in add_trigger(prompt, adapter)
