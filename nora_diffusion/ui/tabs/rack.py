"""The rack: a slider for each ``<lora:name:0.8>`` tag of the prompt. The prompt is the truth, the rack shows it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import gradio as gr

from ...composition.angles import WARN_ABOVE
from ...data.captions import has_word, with_trigger
from ...errors import UserError
from ...formats.adapter_info import AdapterInfo
from ...generation.tags import MAX_WEIGHT, NUMBER, TAG, Tag, parse_tags, write_tags
from ..layout.cards import line
from ..layout.page import HIDDEN, LAST, QUIET, Page, handler
from ..state import App
from ..weights import BLOCKS
from .generate_settings import defaults

SLOTS = 6
SLIDERS = 2 + len(BLOCKS)
NEW_WEIGHT = 0.8
USUAL = 2
"""Sliders go from -USUAL to USUAL, or as far as the prompt does."""
WEIGH = """
(prompt, name, value) => !name ? prompt : prompt.replace(/TAG/gi, (tag) => {
  const [own, ...fields] = tag.slice(1, -1).split(':').slice(1).map((field) => field.trim());
  if (own !== name) return tag;
  const named = Object.fromEntries(
    fields.filter((field) => field.includes('=')).map((field) => field.split('=').map((part) => part.trim())));
  const plain = fields.filter((field) => !field.includes('='));
  const number = (text) => /^(NUMBER)$/.test(text) ? Number(text) : NaN;
  const both = named.te ?? plain[0] ?? '1';
  let te = number(both), unet = number(named.unet ?? plain[1] ?? both);
  if (Number.isNaN(te + unet)) return tag;  // half written
  value = Math.min(MOST, Math.max(-MOST, value ?? 0));  // Gradio shows an emptied field as 0
  CHANGE
  return unet === te ? `<lora:${own}:${unet}>` : `<lora:${own}:unet=${unet}:te=${te}>`;
})
"""
UNET = "if (te === unet) te = value; unet = value;  // together until they were set apart"
TEXT = "te = value;"
NONE_YET = "None yet: teach one in the Train tab, or import one in the Library"


@dataclass
class Slot:
    """One adapter of the rack."""

    group: gr.Group
    name: gr.Textbox
    unet: gr.Slider
    te: gr.Slider
    blocks: list[gr.Slider]
    remove: gr.Button

    def sliders(self) -> list[gr.Slider]:
        """All its numbers."""
        return [self.unet, self.te, *self.blocks]


def build_rack(page: Page, prompt: gr.Textbox, elem_id: str) -> gr.State:
    """The rack below a prompt; returns the factors by block: ``{name: {"down": 1.0, ...}}``."""
    choose = gr.Dropdown(
        [], label="Add an adapter", elem_id=elem_id, interactive=True, filterable=True, allow_custom_value=False
    )
    factors = gr.State({})
    slots = [_slot() for _ in range(SLOTS)]
    alike, seen = gr.HTML("", elem_id=f"{elem_id}-overlap"), gr.State("")
    shown = [part for slot in slots for part in (slot.group, slot.name, *slot.sliders())]
    values = [slider for slot in slots for slider in slot.sliders()]
    gr.on([prompt.change, factors.change], handler(show), [prompt, factors, *values], shown, **LAST, **QUIET)
    prompt.change(handler(overlap_teller(page.app)), [prompt, seen], [alike, seen], **LAST, **QUIET)
    refresh = handler(lambda: offer(names(page)))
    gr.on([page.blocks.load, page.tab.select, page.library_changed.change], refresh, None, choose, **LAST, **QUIET)
    choose.input(handler(add), [prompt, choose], [prompt, choose], **HIDDEN)
    for slot in slots:
        slot.unet.release(None, [prompt, slot.name, slot.unet], prompt, js=weigher(UNET), **QUIET)
        slot.te.release(None, [prompt, slot.name, slot.te], prompt, js=weigher(TEXT), **QUIET)
        slot.remove.click(handler(remove), [prompt, slot.name, factors], [prompt, factors], **HIDDEN)
        gr.on(
            [b.release for b in slot.blocks], handler(factor), [factors, slot.name, *slot.blocks], factors,
            **LAST, **QUIET,
        )  # fmt: skip
    return factors


def _slot() -> Slot:
    with gr.Group(visible=False) as group:
        # A script of the page reads no gr.State. Hidden by style: a group that is shown anew shows all its parts.
        name = gr.Textbox("", elem_classes="inner")
        with gr.Row():
            unet = gr.Slider(-USUAL, USUAL, 1, step=0.05, label="Weight", min_width=200, scale=4)
            out = gr.Button("Remove", size="sm", min_width=90, scale=0, elem_classes="remove")
        with gr.Accordion("Text encoder and blocks", open=False):
            te = gr.Slider(-USUAL, USUAL, 1, step=0.05, label="Text encoder")
            with gr.Row():
                blocks = [gr.Slider(-USUAL, USUAL, 1, step=0.05, label=f"Block: {b}", min_width=120) for b in BLOCKS]
    return Slot(group, name, unet, te, blocks, out)


def weigher(change: str) -> str:
    """The script that writes a slider's weight into its adapter's tag; ``change`` is UNET or TEXT.

    In the browser alone: a server would write an old prompt over what somebody types meanwhile. So this is a second
    reader of ``composition/tags``; a test holds it to the first.
    """
    script = WEIGH.replace("CHANGE", change).replace("MOST", str(MAX_WEIGHT))
    return script.replace("TAG", TAG.pattern).replace("NUMBER", NUMBER.pattern)


def offer(found: list[str]) -> Any:
    """The adapters to choose from, or where they come from."""
    return gr.update(choices=found, info=None if found else NONE_YET)


def names(page: Page) -> list[str]:
    """Adapters of the library that fit the base; the Library tab says why others do not."""
    return [e.tag for e in page.app.library.entries() if e.info and not page.app.misfit(e)]


def show(prompt: str, factors: dict[str, dict[str, float]], *values: float) -> list[Any]:
    """The rack for a prompt and its factors by block; nothing changes while a tag is half written.

    A slider that already says what it should is left alone: it may be moving on while this answer travels.
    """
    try:
        _, tags = parse_tags(prompt or "")
    except UserError:
        return [gr.skip()] * (SLOTS * (2 + SLIDERS))
    rows: list[Any] = []
    for index in range(SLOTS):
        if index >= len(tags):
            rows += [gr.update(visible=False), "", *[gr.skip()] * SLIDERS]
            continue
        tag, now = tags[index], values[index * SLIDERS : (index + 1) * SLIDERS]
        own = (factors or {}).get(tag.name, {})
        wanted = [tag.unet, tag.te, *(own.get(block, 1.0) for block in BLOCKS)]
        sliders = [gr.skip() if old == new else gr.update(**_at(new)) for old, new in zip(now, wanted, strict=True)]
        sliders[0] = gr.update(label=f"{tag.name}: weight", **({} if now[0] == tag.unet else _at(tag.unet)))
        rows += [gr.update(visible=True), tag.name, *sliders]
    return rows


def _at(value: float) -> dict[str, float]:
    """A slider at this value, with room for it: what is out of bounds, Gradio refuses in every event from then on."""
    return {"value": value, "minimum": min(-USUAL, value), "maximum": max(USUAL, value)}


def overlap_teller(app: App) -> Any:
    """A sentence for each two subjects that change the same directions, told before anything is made with them."""

    def tell(prompt: str, seen: str) -> tuple[Any, Any]:
        try:
            names = sorted({tag.name for tag in parse_tags(prompt or "")[1]})
        except UserError:
            return gr.skip(), gr.skip()
        if (now := " ".join(names)) == seen:
            return gr.skip(), gr.skip()
        pairs = [(one, two, app.overlap(one, two)) for one, two in combinations(names[:SLOTS], 2)]
        said = [
            line(
                f"{one} and {two} overlap by {score:.2f}: they change much the same and will disturb each other. "
                "Lower their weights, or keep one.",
                bad=True,
            )
            for one, two, score in pairs
            if score > WARN_ABOVE
        ]
        return "".join(said), now

    return tell


def add(prompt: str, name: str | None) -> tuple[str, Any]:
    """A tag for the chosen adapter at the prompt's end."""
    if not name:
        return prompt, None
    _, tags = parse_tags(prompt or "")
    if all(tag.name != name for tag in tags):
        tags.append(Tag(name, NEW_WEIGHT, NEW_WEIGHT))
    return write_tags(prompt or "", tags), None


def remove(prompt: str, name: str, factors: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The prompt without this adapter, and without a memory of its factors."""
    without = write_tags(prompt, [tag for tag in parse_tags(prompt)[1] if tag.name != name])
    return without, {key: value for key, value in factors.items() if key != name}


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
        prompt = called(app, prompt or "", entry.info)
        tags = parse_tags(prompt)[1]
        if all(tag.name != entry.tag for tag in tags):
            prompt = write_tags(prompt, [*tags, Tag(entry.tag, 1.0, 1.0)])
        return [prompt, gr.Tabs(selected="generate")]

    return insert


def called(app: App, prompt: str, info: AdapterInfo) -> str:
    """The prompt with the words that call an adapter's subject; what somebody wrote stays, and so do all tags."""
    clean, tags = parse_tags(prompt)
    missing = [word for word in info.trigger.replace(",", " ").split() if not has_word(clean, word)]
    if info.trigger and _is_offered(app, clean, alone=not tags):
        return write_tags(own_words(info), tags)
    if not missing:
        return prompt
    word = "" if "," in info.class_word else info.class_word  # a mix has those of all its parts
    return write_tags(with_trigger(clean, " ".join(missing), word), tags)


def own_words(info: AdapterInfo) -> str:
    """What an adapter is called by."""
    return (info.instance_prompt or info.trigger).strip()


def _is_offered(app: App, words: str, alone: bool) -> bool:
    """Whether the page itself wrote these words: its first prompt, or those of an adapter whose tag is gone."""
    offered = {"", defaults(app.engine)["prompt"]}
    if alone:
        offered |= {own_words(entry.info) for entry in app.library.entries() if entry.info}
    return words.strip() in offered
