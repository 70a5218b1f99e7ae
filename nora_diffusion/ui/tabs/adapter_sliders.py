"""Weight sliders for the adapters of a prompt: one for each ``<lora:name:0.8>`` tag.

The prompt is the single source of truth: a slider writes its weight into the tag.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import gradio as gr

from ...adapters.axes import MAX_WEIGHT
from ...data.captions import has_word, with_trigger
from ...errors import UserError
from ...formats.adapter_info import AdapterInfo
from ...generation.tags import NUMBER, TAG, Tag, parse_tags, write_tags
from ..layout.cards import line
from ..layout.page import ALWAYS_LAST, PRIVATE, UNQUEUED, Page, handler
from ..state import App
from ..weights import BLOCKS
from .generate_settings import defaults

SLOTS = 6
SLIDERS = 2 + len(BLOCKS)
NEW_WEIGHT = 0.8
USUAL_WEIGHT = 2
"""Sliders go from -USUAL_WEIGHT to USUAL_WEIGHT, or as far as the weight in the prompt."""
WRITE_WEIGHT = """
(prompt, name, value) => !name ? prompt : prompt.replace(/TAG/gi, (tag) => {
  const [own, ...fields] = tag.slice(1, -1).split(':').slice(1).map((field) => field.trim());
  if (own !== name) return tag;
  const named = Object.fromEntries(
    fields.filter((field) => field.includes('=')).map((field) => field.split('=').map((part) => part.trim())));
  const plain = fields.filter((field) => !field.includes('='));
  const number = (text) => /^(NUMBER)$/.test(text) ? Number(text) : NaN;
  const both = named.te ?? plain[0] ?? '1';
  let te = number(both), unet = number(named.unet ?? plain[1] ?? both);
  if (Number.isNaN(te + unet)) return tag;  // the tag is being typed
  value = Math.min(MAX, Math.max(-MAX, value ?? 0));  // Gradio shows an emptied field as 0
  CHANGE
  return unet === te ? `<lora:${own}:${unet}>` : `<lora:${own}:unet=${unet}:te=${te}>`;
})
"""
UNET = "if (te === unet) te = value; unet = value;  // both, as long as they are equal"
TEXT_ENCODER = "te = value;"
NO_ADAPTERS = "No adapters yet: train one in the Train tab, or import one in the Library tab"


@dataclass
class Slot:
    """The components of one adapter."""

    group: gr.Group
    name: gr.Textbox
    unet: gr.Slider
    te: gr.Slider
    blocks: list[gr.Slider]
    remove: gr.Button

    def sliders(self) -> list[gr.Slider]:
        """All sliders: denoiser, text encoder, blocks."""
        return [self.unet, self.te, *self.blocks]


def build_sliders(page: Page, prompt: gr.Textbox, elem_id: str, one_weight: bool = False) -> gr.State:
    """The sliders below a prompt. Returns the state with the block weights: ``{name: {"down": 1.0, ...}}``.

    ``one_weight``: hide the separate weights of the text encoder and of blocks.
    """
    choose = gr.Dropdown(
        [], label="Add adapter", elem_id=elem_id, interactive=True, filterable=True, allow_custom_value=False
    )
    block_weights = gr.State({})
    slots = [_slot(one_weight, not page.app.engine.is_remote) for _ in range(SLOTS)]
    overlaps, seen = gr.HTML("", elem_id=f"{elem_id}-overlap"), gr.State("")
    outputs = [component for slot in slots for component in (slot.group, slot.name, *slot.sliders())]
    values = [slider for slot in slots for slider in slot.sliders()]
    gr.on(
        [prompt.change, block_weights.change], handler(show), [prompt, block_weights, *values], outputs,
        **ALWAYS_LAST, **UNQUEUED,
    )  # fmt: skip
    if not page.app.engine.is_remote:  # overlaps are computed from the files
        prompt.change(handler(overlap_handler(page.app)), [prompt, seen], [overlaps, seen], **ALWAYS_LAST, **UNQUEUED)
    refresh = handler(lambda: update_choices(usable_names(page)))
    changes = [page.blocks.load, page.tab.select, page.library_changed.change]
    gr.on(changes, refresh, None, choose, **ALWAYS_LAST, **UNQUEUED)
    choose.input(handler(add), [prompt, choose], [prompt, choose], **PRIVATE)
    for slot in slots:
        slot.unet.release(None, [prompt, slot.name, slot.unet], prompt, js=weight_script(UNET), **UNQUEUED)
        slot.te.release(None, [prompt, slot.name, slot.te], prompt, js=weight_script(TEXT_ENCODER), **UNQUEUED)
        slot.remove.click(handler(remove), [prompt, slot.name, block_weights], [prompt, block_weights], **PRIVATE)
        gr.on(
            [b.release for b in slot.blocks], handler(set_block_weights), [block_weights, slot.name, *slot.blocks],
            block_weights, **ALWAYS_LAST, **UNQUEUED,
        )  # fmt: skip
    return block_weights


def _slot(one_weight: bool, with_blocks: bool) -> Slot:
    limits = {"minimum": -USUAL_WEIGHT, "maximum": USUAL_WEIGHT, "value": 1, "step": 0.05}
    with gr.Group(visible=False) as group:
        # Scripts cannot read a gr.State. Hidden by CSS: showing a group again shows everything in it.
        name = gr.Textbox("", elem_classes="inner")
        with gr.Row():
            unet = gr.Slider(**limits, label="Weight", min_width=200, scale=4)
            out = gr.Button("Remove", size="sm", min_width=90, scale=0, elem_classes="remove")
        title = "Text encoder and block weights" if with_blocks else "Text encoder weight"
        with gr.Accordion(title, open=False, visible=not one_weight):
            te = gr.Slider(**limits, label="Text encoder")
            with gr.Row(visible=with_blocks):
                blocks = [gr.Slider(**limits, label=f"Block: {block}", min_width=120) for block in BLOCKS]
    return Slot(group, name, unet, te, blocks, out)


def weight_script(change: str) -> str:
    """The script that writes a slider's weight into its adapter's tag; ``change`` is UNET or TEXT_ENCODER.

    It runs in the browser: a slow server would overwrite what the user types in the meantime. So it parses tags a
    second time, as :mod:`nora_diffusion.generation.tags` does; a test compares the two.
    """
    script = WRITE_WEIGHT.replace("CHANGE", change).replace("MAX", str(MAX_WEIGHT))
    return script.replace("TAG", TAG.pattern).replace("NUMBER", NUMBER.pattern)


def update_choices(found: list[str]) -> Any:
    """Update of an adapter dropdown, with a hint if there are no adapters."""
    return gr.update(choices=found, info="" if found else NO_ADAPTERS)


def usable_names(page: Page) -> list[str]:
    """Adapters of the library that can be used with the base. The Library tab says why others cannot."""
    return [e.tag for e in page.app.library.entries() if e.info and not page.app.problem(e)]


def show(prompt: str, block_weights: dict[str, dict[str, float]], *values: float) -> list[Any]:
    """Updates of all slots for a prompt; nothing changes while a tag is being typed.

    A slider with the right value is not updated: the user may still be moving it when the update arrives.
    """
    try:
        _, tags = parse_tags(prompt or "")
    except UserError:
        return [gr.skip()] * (SLOTS * (2 + SLIDERS))
    updates: list[Any] = []
    for index in range(SLOTS):
        if index >= len(tags):
            updates += [gr.update(visible=False), "", *[gr.skip()] * SLIDERS]
            continue
        tag, now = tags[index], values[index * SLIDERS : (index + 1) * SLIDERS]
        blocks = (block_weights or {}).get(tag.name, {})
        new = [tag.unet, tag.te, *(blocks.get(block, 1.0) for block in BLOCKS)]
        sliders = [gr.skip() if a == b else gr.update(**_slider_at(b)) for a, b in zip(now, new, strict=True)]
        sliders[0] = gr.update(label=f"{tag.name}: weight", **({} if now[0] == tag.unet else _slider_at(tag.unet)))
        updates += [gr.update(visible=True), tag.name, *sliders]
    return updates


def _slider_at(value: float) -> dict[str, float]:
    """Slider update with limits that include the value: Gradio refuses every later event of a slider out of bounds."""
    return {"value": value, "minimum": min(-USUAL_WEIGHT, value), "maximum": max(USUAL_WEIGHT, value)}


def overlap_handler(app: App) -> Any:
    """Warn about each two adapters of the prompt that change nearly the same directions."""

    def warn(prompt: str, seen: str) -> tuple[Any, Any]:
        from ...composition.angles import WARN_ABOVE

        try:
            names = sorted({tag.name for tag in parse_tags(prompt or "")[1]})
        except UserError:
            return gr.skip(), gr.skip()
        if (now := " ".join(names)) == seen:
            return gr.skip(), gr.skip()
        pairs = [(one, two, app.overlap(one, two)) for one, two in combinations(names[:SLOTS], 2)]
        warnings = [
            line(
                f"{one} and {two} overlap by {score:.2f}: they change nearly the same directions and will interfere. "
                "Lower their weights, or use only one.",
                bad=True,
            )
            for one, two, score in pairs
            if score > WARN_ABOVE
        ]
        return "".join(warnings), now

    return warn


def add(prompt: str, name: str | None) -> tuple[str, Any]:
    """Append a tag for the chosen adapter to the prompt."""
    if not name:
        return prompt, None
    _, tags = parse_tags(prompt or "")
    if all(tag.name != name for tag in tags):
        tags.append(Tag(name, NEW_WEIGHT, NEW_WEIGHT))
    return write_tags(prompt or "", tags), None


def remove(prompt: str, name: str, block_weights: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Remove an adapter's tag and its block weights."""
    without = write_tags(prompt, [tag for tag in parse_tags(prompt)[1] if tag.name != name])
    return without, {key: value for key, value in block_weights.items() if key != name}


def set_block_weights(
    block_weights: dict[str, dict[str, float]], name: str, *values: float
) -> dict[str, dict[str, float]]:
    """Store the block weights of one adapter."""
    return {**block_weights, name: dict(zip(BLOCKS, map(float, values), strict=True))} if name else block_weights


def insert_handler(app: App) -> Any:
    """Add an adapter's tag, and its trigger words if they are missing, to the prompt; open the Generate tab."""

    def insert(prompt: str, name: str) -> list[Any]:
        entry = app.library.entry(name)
        problem = app.problem(entry)
        if problem or entry.info is None:
            raise UserError(f"{name} cannot be used with this base: {problem}")
        prompt = with_trigger_words(app, prompt or "", entry.info)
        tags = parse_tags(prompt)[1]
        if all(tag.name != entry.tag for tag in tags):
            prompt = write_tags(prompt, [*tags, Tag(entry.tag, 1.0, 1.0)])
        return [prompt, gr.Tabs(selected="generate")]

    return insert


def with_trigger_words(app: App, prompt: str, info: AdapterInfo) -> str:
    """The prompt with an adapter's trigger words added. What the user wrote stays, and so do all tags."""
    clean, tags = parse_tags(prompt)
    if info.trigger and _is_suggested(app, clean, alone=not tags):
        return write_tags(own_prompt(info), tags)
    text = with_missing_words(clean, info)
    return prompt if text == clean else write_tags(text, tags)


def with_missing_words(text: str, info: AdapterInfo) -> str:
    """A prompt without tags, with the trigger words of an adapter that it does not have."""
    missing = [word for word in info.trigger.replace(",", " ").split() if not has_word(text, word)]
    class_word = "" if "," in info.class_word else info.class_word  # a mix has one for each of its adapters
    return with_trigger(text, " ".join(missing), class_word) if missing else text


def own_prompt(info: AdapterInfo) -> str:
    """The prompt that an adapter was trained with, or its trigger word."""
    return (info.instance_prompt or info.trigger).strip()


def _is_suggested(app: App, text: str, alone: bool) -> bool:
    """Whether the page itself wrote this text: its first prompt, or the prompt of an adapter whose tag is gone."""
    suggested = {"", defaults(app.engine)["prompt"]}
    if alone:
        suggested |= {own_prompt(entry.info) for entry in app.library.entries() if entry.info}
    return text.strip() in suggested
