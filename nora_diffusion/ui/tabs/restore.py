"""Settings from a dropped image: first a table of the changes, then the change."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ...errors import UserError
from ...generation.image_settings import ImageSettings, read_settings, tag_of
from ...generation.tags import write_tags
from ..layout.cards import line
from ..layout.page import PRIVATE, UNQUEUED, Page, handler
from ..messages import sentence
from ..state import App
from .generate_settings import Settings

FULL_HASH = 64
LABELS = {
    "prompt": "Prompt", "negative": "Negative prompt", "count": "Number of images", "seed": "Seed", "steps": "Steps",
    "guidance": "CFG scale", "width": "Width", "height": "Height",
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
        values = [restored["values"][name] for name in fields]
        return [*values, restored["blocks"], None, line("Applied."), gr.update(visible=False)]

    outputs = [found, changes, choice]
    drop.upload(handler(preview), [drop, *fields.values()], outputs, api_name="preview_settings", **PRIVATE)
    drop.clear(handler(lambda: [None, "", gr.update(visible=False)]), None, outputs, **UNQUEUED)
    # Queued: an unqueued event triggers no `change` of a state, which the sliders need for `block_weights`.
    apply.click(handler(take), found, [*fields.values(), block_weights, drop, changes, choice], **PRIVATE)
    discard.click(handler(lambda: [None, "", gr.update(visible=False), None]), None, [*outputs, drop], **UNQUEUED)


def restored(app: App, image: ImageSettings) -> tuple[dict[str, Any], dict[str, dict[str, float]], list[str]]:
    """The values for the page, the block weights, and a note for everything that cannot be restored.

    Adapters are matched by the full SHA-256 of their file only: a name or a short hash is ambiguous.
    """
    tags, block_weights, notes = [], {}, []
    for adapter in image.adapters:
        digest = str(adapter.get("sha256", ""))
        name, entry = str(adapter["name"]), app.library.by_hash(digest)
        if entry is None:
            hash_text = f"SHA-256 {digest}" if len(digest) == FULL_HASH else "no full SHA-256 given"
            notes.append(f"The adapter {name} ({hash_text}) is not in the library and is left out.")
            continue
        tags.append(tag_of({**adapter, "name": entry.tag}))
        if adapter.get("blocks"):
            block_weights[entry.tag] = {str(k): float(v) for k, v in dict(adapter["blocks"]).items()}
    base = app.engine.base_id
    if image.base and image.base != base:
        notes.append(f"The image was made with the base model {image.base}; this app runs {base}.")
    values = {
        "prompt": write_tags(image.prompt, tags), "negative": image.negative_prompt, "count": 1,
        "seed": image.seed, "steps": image.steps, "guidance": image.guidance, "width": image.width,
        "height": image.height,
    }  # fmt: skip
    return values, block_weights, notes


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
