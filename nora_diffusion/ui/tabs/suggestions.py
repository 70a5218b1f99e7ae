"""Adapters of the library that suit the prompt, below it. They are looked for when the prompt is left, not at each key.

The text encoder is the pipeline's, so that this takes turns with images: short ones, each in a place of its own in the
queue. If the device stays busy, as in a training, nothing is suggested.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from ...errors import UserError
from ...generation.library import NamedAdapter
from ...generation.retrieval.automatic import with_triggers
from ...generation.tags import Tag, parse_tags, write_tags
from ..layout.cards import line, suggestions
from ..layout.page import ALWAYS_LAST, PRIVATE, Page, handler
from ..state import App
from .adapter_sliders import own_prompt, with_missing_words

MOST = 3
PATIENCE = 5.0
"""Seconds to wait for a turn on the device."""
BUSY = "Adapters for this prompt are suggested when the device is free: leave the prompt once more then."
PICK = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-name]');
  if (button) trigger('click', {name: button.dataset.name});
});
"""


def build(page: Page) -> None:
    """The line of suggestions, empty if none suits the prompt. Not there if a server makes the images."""
    if page.app.engine.is_remote:
        return
    shown, seen = gr.HTML("", elem_id="suggestions", js_on_load=PICK), gr.State("")
    search: dict[str, Any] = {
        "fn": handler(suggest_handler(page.app)), "inputs": [page.prompt, seen], "outputs": [shown, seen], **PRIVATE,
    }  # fmt: skip
    gr.on([page.prompt.blur, page.prompt.submit], **search, api_name="suggest", **ALWAYS_LAST)
    added = shown.click(
        handler(add_handler(page.app)), page.prompt, page.prompt, api_name="add_suggested", **PRIVATE
    )  # fmt: skip
    added.then(**search, **ALWAYS_LAST)


def suggest_handler(app: App) -> Any:
    """The suggestions for a prompt; nothing if prompt and library are those of the last time (``seen``)."""

    def suggest(prompt: str, seen: str) -> Iterator[tuple[Any, Any]]:
        try:
            text, tags = parse_tags(prompt or "")
        except UserError:  # a tag is being typed
            return
        adapters = candidates(app, {tag.name for tag in tags})
        now = "\n".join([text, *(f"{adapter.name} {adapter.path}" for adapter in adapters)])
        if now == seen:
            return
        found = look(app, adapters, text) if adapters and text.strip() else []
        yield (line(BUSY), gr.skip()) if found is None else (suggestions(found), now)

    return suggest


def look(app: App, adapters: Sequence[NamedAdapter], text: str) -> list[tuple[str, float]] | None:
    """Names and scores of the adapters that suit a text; ``None`` if the device stays busy.

    Between two turns, in which the vectors of some adapters are computed, others in the queue have theirs.
    """
    found = None
    while found is None:
        turn = app.device.join("suggestions")
        try:
            if not turn.wait(PATIENCE):
                return None
            found = app.engine.suggest(adapters, text, MOST)
        finally:
            turn.leave()
    return [(adapter.name, score) for adapter, score in found]


def candidates(app: App, named: set[str]) -> list[NamedAdapter]:
    """The adapters that may be suggested: those that the base can use and the prompt does not name."""
    return [
        NamedAdapter(entry.tag, str(entry.file), info=entry.info)
        for entry in app.library.entries()
        if entry.info and entry.tag not in named and not app.problem(entry)
    ]


def add_handler(app: App) -> Any:
    """Add the tag of the suggestion that was clicked, and its trigger words, to the prompt."""

    def add(prompt: str, event: gr.EventData) -> str:
        entry = app.library.entry(str(getattr(event, "name", "")))
        problem = app.problem(entry)
        if problem or entry.info is None:
            raise UserError(f"{entry.name} cannot be used with this base: {problem}")
        text, tags = parse_tags(prompt or "")
        if any(tag.name == entry.tag for tag in tags):
            return prompt
        text = (
            with_missing_words(with_triggers(text, [entry.info]), entry.info)
            if text.strip()
            else own_prompt(entry.info)
        )
        return write_tags(text, [*tags, Tag(entry.tag)])

    return add
