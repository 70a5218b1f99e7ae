"""Adapters and prompts: the words that call a subject, without those that somebody wrote being lost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nora_diffusion.formats.adapter_info import AdapterInfo
from nora_diffusion.ui.tabs.compare import speaker
from nora_diffusion.ui.tabs.generate_settings import FIRST_PROMPT
from nora_diffusion.ui.tabs.rack import inserter

INFOS = {
    "dog": AdapterInfo({}, trigger="sks", class_word="dog", instance_prompt="a sks dog"),
    "cat": AdapterInfo({}, trigger="sks", class_word="cat", instance_prompt="a sks cat"),
    "hat": AdapterInfo({}, trigger="zwx", instance_prompt="a zwx hat"),
    "both": AdapterInfo({}, trigger="sks, zwx", class_word="dog, hat", instance_prompt="a sks dog and a zwx hat"),
    "style": AdapterInfo({}),
}


@pytest.fixture
def app() -> Any:
    entries = {name: SimpleNamespace(info=info, tag=name, fault="") for name, info in INFOS.items()}
    return SimpleNamespace(
        engine=SimpleNamespace(base=None, is_embedded=True, guidance=5.0), misfit=lambda entry: None,
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
def test_the_prompt_calls_the_subject_and_keeps_what_was_written(
    app: Any, prompt: str, adapter: str, expected: str
) -> None:
    assert inserter(app)(prompt, adapter)[0] == expected


def test_comparing_keeps_what_was_written(app: Any) -> None:
    speak = speaker(app)
    assert speak("a dog by the sea", "dog") == "a sks dog by the sea"
    assert speak("a zwx hat", "dog") == "a sks dog"  # as the adapter before had it
    for prompt, adapter in (("sks, by the sea", "dog"), ("by the sea", "none"), ("by the sea", None)):
        assert speak(prompt, adapter).get("__type__") == "update" and "value" not in speak(prompt, adapter)
