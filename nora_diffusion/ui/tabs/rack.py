"""The rack: a slider for each ``<lora:name:0.8>`` tag of the prompt. The prompt is the truth, the rack shows it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from ...composition.tags import Tag, parse_tags, write_tags
from ...errors import UserError
from ..page import QUIET, Page, handler
from ..state import App
from ..weights import BLOCKS

SLOTS = 6
NEW_WEIGHT = 0.8


@dataclass
class Slot:
    """One adapter of the rack."""

    group: gr.Group
    name: gr.State
    unet: gr.Slider
    te: gr.Slider
    fold: gr.Accordion
    blocks: list[gr.Slider]
    remove: gr.Button

    def parts(self) -> list[Any]:
        """What a change of the prompt writes."""
        return [self.group, self.name, self.unet, self.te]


def build_rack(page: Page, prompt: gr.Textbox, elem_id: str) -> gr.State:
    """The rack below a prompt; returns the factors by block: ``{name: {"down": 1.0, ...}}``."""
    choose = gr.Dropdown(
        [], label="Add an adapter", elem_id=elem_id, interactive=True, filterable=True, allow_custom_value=False
    )
    factors = gr.State({})
    slots = [_slot() for _ in range(SLOTS)]
    shown = [part for slot in slots for part in slot.parts()]
    weights = [slider for slot in slots for slider in (slot.unet, slot.te)]
    prompt.change(handler(show), [prompt, *weights], shown, trigger_mode="always_last", **QUIET)
    refresh = handler(lambda: gr.update(choices=names(page), value=None))
    for event in (page.blocks.load, page.tab.select, page.library_changed.change):
        event(refresh, None, choose, **QUIET)
    choose.input(handler(add), [prompt, choose], [prompt, choose], **QUIET)
    for slot in slots:
        # Gradio drops a change that comes while an earlier one is still on its way, unless told otherwise.
        last: dict[str, Any] = {"trigger_mode": "always_last", **QUIET}
        slot.unet.release(handler(weigh), [prompt, slot.name, slot.unet], prompt, **last)
        slot.te.release(handler(weigh_text), [prompt, slot.name, slot.te], prompt, **last)
        slot.remove.click(handler(remove), [prompt, slot.name], prompt, **QUIET)
        gr.on([b.release for b in slot.blocks], handler(factor), [factors, slot.name, *slot.blocks], factors, **last)
    return factors


def _slot() -> Slot:
    with gr.Group(visible=False) as group:
        name = gr.State("")
        with gr.Row():
            unet = gr.Slider(-2, 2, 1, step=0.05, label="Weight", min_width=200, scale=4)
            out = gr.Button("Remove", size="sm", min_width=90, scale=0, elem_classes="remove")
        with gr.Accordion("Text encoder and blocks", open=False) as fold:
            te = gr.Slider(-2, 2, 1, step=0.05, label="Text encoder")
            with gr.Row():
                blocks = [gr.Slider(-2, 2, 1, step=0.05, label=f"Block: {b}", min_width=120) for b in BLOCKS]
    return Slot(group, name, unet, te, fold, blocks, out)


def names(page: Page) -> list[str]:
    """Adapters of the library that fit the base; the Library tab says why others do not."""
    return [e.tag for e in page.app.library.entries() if e.info and not page.app.misfit(e)]


def show(prompt: str, *weights: float) -> list[Any]:
    """The rack for a prompt; nothing changes while a tag is half written.

    A slider that already says what its tag says is left alone: it may be moving on while this answer travels.
    """
    try:
        _, tags = parse_tags(prompt or "")
    except UserError:
        return [gr.skip()] * (SLOTS * 4)
    rows: list[Any] = []
    for index in range(SLOTS):
        tag = tags[index] if index < len(tags) else None
        if tag is None:
            rows += [gr.update(visible=False), "", gr.skip(), gr.skip()]
        else:
            label = f"{tag.name}: weight"
            unet, te = weights[2 * index : 2 * index + 2]
            rows += [
                gr.update(visible=True), tag.name,
                gr.update(label=label) if unet == tag.unet else gr.update(value=tag.unet, label=label),
                gr.skip() if te == tag.te else tag.te,
            ]  # fmt: skip
    return rows


def add(prompt: str, name: str | None) -> tuple[str, Any]:
    """A tag for the chosen adapter at the prompt's end."""
    if not name:
        return prompt, None
    _, tags = parse_tags(prompt or "")
    if all(tag.name != name for tag in tags):
        tags.append(Tag(name, NEW_WEIGHT, NEW_WEIGHT))
    return write_tags(prompt or "", tags), None


def weigh(prompt: str, name: str, unet: float) -> str:
    """The slider's weight in the adapter's tag. The text encoder follows until it was set apart."""
    tags = parse_tags(prompt)[1]
    changed = [replace(t, unet=float(unet), te=float(unet) if t.te == t.unet else t.te) for t in tags if t.name == name]
    return _with(prompt, tags, changed)


def weigh_text(prompt: str, name: str, te: float) -> str:
    """The text encoder's own weight in the adapter's tag."""
    tags = parse_tags(prompt)[1]
    return _with(prompt, tags, [replace(tag, te=float(te)) for tag in tags if tag.name == name])


def _with(prompt: str, tags: list[Tag], changed: list[Tag]) -> str:
    new = {tag.name: tag for tag in changed}
    return write_tags(prompt, [new.get(tag.name, tag) for tag in tags])


def remove(prompt: str, name: str) -> str:
    """The prompt without this adapter."""
    return write_tags(prompt, [tag for tag in parse_tags(prompt)[1] if tag.name != name])


def factor(factors: dict[str, dict[str, float]], name: str, *values: float) -> dict[str, dict[str, float]]:
    """Remember the factors by block of one adapter."""
    return {**factors, name: dict(zip(BLOCKS, map(float, values), strict=True))} if name else factors


def inserter(app: App) -> Any:
    """Put a tag, and the subject's words where they are missing, into the prompt and go there."""

    def insert(prompt: str, name: str) -> list[Any]:
        entry = app.library.entry(name)
        misfit = app.misfit(entry)
        if misfit or entry.info is None:
            raise UserError(f"{name} cannot be used here: {misfit}")
        clean, tags = parse_tags(prompt or "")
        words = entry.info.instance_prompt or entry.info.trigger
        if entry.info.trigger and entry.info.trigger not in clean.split():
            prompt = write_tags(words, tags)
        if all(tag.name != entry.tag for tag in tags):
            prompt = write_tags(prompt or "", [*tags, Tag(entry.tag, 1.0, 1.0)])
        return [prompt, gr.Tabs(selected="generate")]

    return insert
