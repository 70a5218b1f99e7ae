"""Settings from a dropped picture: first what would change, then the change."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ...errors import UserError
from ...generation.image_settings import ImageSettings, read_settings, tag_of
from ...generation.tags import write_tags
from ..layout.cards import line
from ..layout.page import HIDDEN, QUIET, Page, handler
from ..messages import sentence
from ..state import App
from .generate_settings import Settings

FULL_HASH = 64
LABELS = {
    "prompt": "Prompt", "negative": "Negative prompt", "count": "Pictures", "seed": "Seed", "steps": "Steps",
    "guidance": "Guidance", "width": "Width", "height": "Height",
}  # fmt: skip


def build(page: Page, settings: Settings, blocks: gr.State) -> None:
    """A place to drop a picture, the changes it would make, and two buttons."""
    fields = {"prompt": page.prompt} | settings.components()
    with gr.Accordion("Settings from a picture", open=False, elem_id="restore"):
        drop = gr.File(
            label="Drop a PNG that carries settings", file_types=[".png"], height=140, elem_id="drop-picture"
        )
        changes = gr.HTML("", elem_id="changes")
        with gr.Row(visible=False) as choice:
            apply = gr.Button("Apply", variant="primary", elem_id="apply")
            leave = gr.Button("Leave as it is", elem_id="leave")
    found = gr.State(None)

    def look(file: str | None, *now: Any) -> list[Any]:
        if not file:
            return [None, "", gr.update(visible=False)]
        try:
            values, factors, notes = restored(page.app, read_settings(Path(file)))
        except UserError as error:  # said where the table would be: a toast would leave the last answer standing
            return [None, line(sentence(error), bad=True), gr.update(visible=False)]
        shown = table(dict(zip(fields, now, strict=True)), values, notes)
        return [{"values": values, "blocks": factors}, shown, gr.update(visible=True)]

    def take(restored: dict[str, Any] | None) -> list[Any]:
        if restored is None:
            return [gr.skip()] * (len(fields) + 1) + [None, "", gr.update(visible=False)]
        values = [restored["values"][name] for name in fields]
        return [*values, restored["blocks"], None, line("Applied."), gr.update(visible=False)]

    seen = [found, changes, choice]
    drop.upload(handler(look), [drop, *fields.values()], seen, api_name="look", **HIDDEN)
    drop.clear(handler(lambda: [None, "", gr.update(visible=False)]), None, seen, **QUIET)
    # In the queue: what is answered past it tells nobody that a state has changed, and the rack listens to `blocks`.
    apply.click(handler(take), found, [*fields.values(), blocks, drop, changes, choice], **HIDDEN)
    leave.click(handler(lambda: [None, "", gr.update(visible=False), None]), None, [*seen, drop], **QUIET)


def restored(app: App, picture: ImageSettings) -> tuple[dict[str, Any], dict[str, dict[str, float]], list[str]]:
    """The values for the page, the factors by block, and what cannot be restored, in words.

    An adapter is the same only if the full SHA-256 of its file is; a name proves nothing, and neither do a few digits.
    """
    tags, factors, notes = [], {}, []
    for adapter in picture.adapters:
        digest = str(adapter.get("sha256", ""))
        name, entry = str(adapter["name"]), app.library.by_hash(digest)
        if entry is None:
            some = f"SHA-256 {digest}" if len(digest) == FULL_HASH else "no full SHA-256 given"
            notes.append(f"The adapter {name} ({some}) is not in the library and is left out.")
            continue
        tags.append(tag_of({**adapter, "name": entry.tag}))
        if adapter.get("blocks"):
            factors[entry.tag] = {str(k): float(v) for k, v in dict(adapter["blocks"]).items()}
    ours = app.engine.base_id
    if picture.base and picture.base != ours:
        notes.append(f"The picture was made with the base {picture.base}; this is {ours}.")
    values = {
        "prompt": write_tags(picture.prompt, tags), "negative": picture.negative_prompt, "count": 1,
        "seed": picture.seed, "steps": picture.steps, "guidance": picture.guidance, "width": picture.width,
        "height": picture.height,
    }  # fmt: skip
    return values, factors, notes


def table(now: dict[str, Any], then: dict[str, Any], notes: list[str]) -> str:
    """What would change, setting by setting."""
    rows = [
        f'<tr><th scope="row">{LABELS[name]}</th><td>{escape(str(now[name]))}</td><td>{escape(str(value))}</td></tr>'
        for name, value in then.items()
        if now[name] != value
    ]
    head = '<tr><th scope="col">Setting</th><th scope="col">Now</th><th scope="col">In the picture</th></tr>'
    said = "".join(line(note, bad=True) for note in notes)
    if not rows:
        return said + line("All settings are as in the picture already.")
    return f'{said}<table class="facts"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'
