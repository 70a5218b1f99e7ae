"""Settings from a dropped image: first a table of the changes, then the change."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ...errors import UserError
from ...generation.image_settings import ImageSettings, read_settings, tag_of
from ...generation.samplers import sampler_named
from ...generation.settings import check_prompt
from ...generation.tags import write_tags
from ..layout.cards import line
from ..layout.page import PRIVATE, UNQUEUED, Page, handler
from ..messages import sentence
from ..request import LIMITS
from ..state import App
from ..weights import AdapterWeights
from .generate_settings import OWN_SAMPLER, Settings

FULL_HASH = 64
MAX_ADAPTERS = 32
MAX_SHOWN = 80
"""Characters of a name or of an invalid value that are shown."""
LABELS = {
    "prompt": "Prompt", "negative": "Negative prompt", "count": "Number of images", "seed": "Seed", "steps": "Steps",
    "guidance": "CFG scale", "width": "Width", "height": "Height",
    "apart": "Keep subjects apart", "sampler": "Sampler", "hires": "Second pass: enlarge by",
    "hires_strength": "Second pass: changes",
}  # fmt: skip


def build(page: Page, settings: Settings, block_weights: gr.State) -> None:
    """A field for an image, the changes it would make, and two buttons."""
    fields = {"prompt": page.prompt} | settings.components()
    with gr.Accordion("Settings from an image", open=False, elem_id="restore"):
        drop = gr.File(label="PNG with generation parameters", file_types=[".png"], height=140, elem_id="drop-image")
        changes = gr.HTML("", elem_id="changes")
        with gr.Row(visible=False) as choice:
            apply = gr.Button("Apply", variant="primary", elem_id="apply")
            discard = gr.Button("Discard", elem_id="leave")
    found = gr.State(None)

    def preview(file: str | None, *now: Any) -> list[Any]:
        if not file:
            return [None, "", gr.update(visible=False)]
        try:
            values, weights, notes = restored(page.app, read_settings(Path(file)))
        except UserError as error:  # shown in place of the table: a toast would leave the table of the last image
            return [None, line(sentence(error), bad=True), gr.update(visible=False)]
        table = changes_table(dict(zip(fields, now, strict=True)), values, notes)
        return [{"values": values, "blocks": weights}, table, gr.update(visible=True)]

    def take(restored: dict[str, Any] | None) -> list[Any]:
        if restored is None:
            return [gr.skip()] * (len(fields) + 1) + [None, "", gr.update(visible=False)]
        values = [restored["values"].get(name, gr.skip()) for name in fields]
        return [*values, restored["blocks"], None, line("Applied."), gr.update(visible=False)]

    outputs = [found, changes, choice]
    drop.upload(handler(preview), [drop, *fields.values()], outputs, api_name="preview_settings", **PRIVATE)
    drop.clear(handler(lambda: [None, "", gr.update(visible=False)]), None, outputs, **UNQUEUED)
    # Queued: an unqueued event triggers no `change` of a state, which the sliders need for `block_weights`.
    apply.click(handler(take), found, [*fields.values(), block_weights, drop, changes, choice], **PRIVATE)
    discard.click(handler(lambda: [None, "", gr.update(visible=False), None]), None, [*outputs, drop], **UNQUEUED)


def restored(app: App, image: ImageSettings) -> tuple[dict[str, Any], dict[str, dict[str, float]], list[str]]:
    """The values for the page, the block weights, and a note for everything that cannot be restored.

    Adapters are matched by the full SHA-256 of their file only: a name or a short hash is ambiguous. Every value is
    within the limits of the form, or left out.
    """
    tags, block_weights, notes = [], {}, []
    for adapter in image.adapters[:MAX_ADAPTERS]:
        digest = str(adapter.get("sha256", ""))
        name, entry = str(adapter["name"])[:MAX_SHOWN], app.library.by_hash(digest)
        if entry is None:
            hash_text = f"SHA-256 {digest}" if len(digest) == FULL_HASH else "no full SHA-256 given"
            notes.append(f"The adapter {name} ({hash_text}) is not in the library and is left out.")
            continue
        tags.append(tag_of({**adapter, "name": entry.tag}))
        try:
            if blocks := _block_weights(adapter):
                block_weights[entry.tag] = blocks
        except UserError as error:
            notes.append(f"The block weights of the adapter {name} are left out: {error}.")
    if len(image.adapters) > MAX_ADAPTERS:
        notes.append(f"Only {MAX_ADAPTERS} of {len(image.adapters)} adapters are read.")
    base = app.engine.base_id
    if image.base and image.base != base:
        notes.append(f"The image was made with the base model {image.base[:MAX_SHOWN]}; this app runs {base}.")
    values: dict[str, Any] = {"count": 1}
    if len(image.adapters) > 1:
        values["apart"] = any("words" in adapter for adapter in image.adapters)
    stored: dict[str, Any] = {
        "prompt": image.prompt, "negative": image.negative_prompt, "seed": image.seed, "steps": image.steps,
        "guidance": image.guidance, "width": image.width, "height": image.height,
        "hires": image.hires.get("scale", 1), **({"hires_strength": image.hires["strength"]} if image.hires else {}),
    }  # fmt: skip
    for name, value in stored.items():
        try:
            values[name] = _checked(name, write_tags(value, tags) if name == "prompt" else value, app.engine.max_side)
        except UserError as error:
            notes.append(f"{LABELS[name]} is left out: {error}.")
    sampler = sampler_named(image.sampler)
    values["sampler"] = sampler or OWN_SAMPLER
    if not sampler and image.sampler and not image.sampler.endswith("Scheduler"):  # else the base's own
        notes.append(f"The sampler {image.sampler[:MAX_SHOWN]} is not offered: the base's own is used.")
    if image.start:
        notes.append(
            f"The image was made from another one, {str(image.start.get('image'))[:MAX_SHOWN]}, not from noise."
        )
    return values, block_weights, notes


def _checked(name: str, value: Any, max_side: int) -> Any:
    """Return a value that the field ``name`` accepts. Raises :class:`UserError` for others."""
    if isinstance(value, str):
        check_prompt(value)
        return value
    is_side = name in ("width", "height")
    low, high = LIMITS[name] if not is_side else (0, max_side)
    if not low <= value <= high:  # also for NaN
        raise UserError(f"{str(value)[:MAX_SHOWN]} is outside {low} to {high}")
    if is_side and value % 8:
        raise UserError(f"{value} is not a multiple of 8")
    return value


def _block_weights(adapter: dict[str, Any]) -> dict[str, float]:
    """The block weights of an adapter in an image's settings. Raises :class:`UserError` for invalid ones."""
    try:
        blocks = {str(block)[:MAX_SHOWN]: float(weight) for block, weight in dict(adapter.get("blocks") or {}).items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"they cannot be read ({str(error)[:MAX_SHOWN]})") from error
    return dict(AdapterWeights(blocks=blocks).blocks)


def changes_table(now: dict[str, Any], new: dict[str, Any], notes: list[str]) -> str:
    """The settings that would change, as HTML."""
    rows = [
        f'<tr><th scope="row">{LABELS[name]}</th><td>{escape(str(now[name]))}</td><td>{escape(str(value))}</td></tr>'
        for name, value in new.items()
        if now[name] != value
    ]
    head = '<tr><th scope="col">Setting</th><th scope="col">Now</th><th scope="col">In the image</th></tr>'
    notes_html = "".join(line(note, bad=True) for note in notes)
    if not rows:
        return notes_html + line("All settings are already the same as in the image.")
    return f'{notes_html}<table class="facts"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'
