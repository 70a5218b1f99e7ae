"""The Library tab: cards of adapters; search, details, insert, import, export, delete and undo."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr

from ...adapters import PRESETS
from ...errors import UserError
from ..backend import ELSEWHERE
from ..layout.cards import EMPTY, NO_MATCH, cards, details
from ..layout.page import ALWAYS_LAST, PRIVATE, UNQUEUED, Page, handler, toast
from ..library import SORTS, safe_name
from ..state import App
from .adapter_sliders import insert_handler

TITLE = "Library"
PAGE_SIZE = 60
METHODS = ("all", *PRESETS)
FORMATS = (("diffusers", "diffusers"), ("kohya (A1111, ComfyUI …)", "kohya"))
PICK = """
element.addEventListener('click', (event) => {
  const card = event.target.closest('[data-name]');
  if (card) trigger('click', {name: card.dataset.name});
});
"""
SHOW_CHOSEN = "() => { if (innerWidth < 640) document.querySelector('#library-chosen')?.scrollIntoView(); }"
MAX_IMPORTS = 50


def build(page: Page) -> None:
    """Search above the cards; details of the chosen adapter on their right, on a phone above them."""
    app = page.app
    with gr.Row():
        words = gr.Textbox(
            label="Search", placeholder="name, trigger word, base, hash", elem_id="search", scale=3, min_width=240
        )
        sort = gr.Dropdown(list(SORTS), value=SORTS[0], label="Sort by", min_width=140)
        method = gr.Dropdown(list(METHODS), value="all", label="Method", min_width=140, allow_custom_value=True)
    with gr.Row(elem_id="library-areas"):
        with gr.Column(elem_id="library-cards"):
            grid = gr.HTML("", elem_id="cards", js_on_load=PICK)
            more = gr.Button("Show more", visible=False)
        with gr.Column(visible=False, elem_id="library-chosen") as panel:
            chosen = _panel(app, panel)
        with gr.Column(elem_id="library-import"):
            undo = gr.Button("Undo delete", visible=False, elem_id="undo")
            drop = gr.File(
                label="Import adapters or packs (.safetensors)", file_count="multiple",
                file_types=[".safetensors"], height=120, elem_id="import", visible=app.may_change,
            )  # fmt: skip
    shown = gr.State(PAGE_SIZE)
    query = [words, sort, method, shown, chosen.name]
    changes = [component.change for component in (*query, page.library_changed)]
    events = [page.blocks.load, page.tab.select, *changes]
    gr.on(events, handler(list_handler(app)), query, [grid, more], **ALWAYS_LAST, **PRIVATE)
    more.click(lambda n: n + PAGE_SIZE, shown, shown, **PRIVATE)
    picked = grid.click(
        handler(pick_handler(app)), None,
        [chosen.name, panel, chosen.about, chosen.exported, chosen.insert, chosen.delete, chosen.choose,
         chosen.candidates, chosen.offered],
        api_name="pick", **PRIVATE,
    )  # fmt: skip
    picked.then(None, js=SHOW_CHOSEN, **UNQUEUED)
    _act(page, chosen, undo, drop)


def _panel(app: App, panel: gr.Column) -> SimpleNamespace:
    """Details of the chosen adapter, and its buttons."""
    about = gr.HTML("", elem_id="about")
    insert = gr.Button("Add to prompt", variant="primary", elem_id="insert")
    here = not app.engine.is_remote
    form = gr.Dropdown(list(FORMATS), value="diffusers", label="Export as LoRA for", visible=here)
    export = gr.Button("Export", visible=here)
    exported = gr.File(label="Exported", visible=False, interactive=False, height=100)
    with gr.Accordion("Choose a thumbnail", open=True, visible=False, elem_id="choose-thumbnail") as choose:
        candidates = gr.Gallery(
            label="Images made with this adapter", show_label=False, columns=4, height=150, allow_preview=False,
            format="png", interactive=False, buttons=[], elem_classes=["pixels"] if app.engine.is_embedded else [],
        )  # fmt: skip
    delete = gr.Button("Delete", variant="stop", visible=app.may_change, elem_id="delete")
    return SimpleNamespace(
        panel=panel, about=about, insert=insert, form=form, export=export, exported=exported, choose=choose,
        candidates=candidates, delete=delete, name=gr.State(""), offered=gr.State([]),
    )  # fmt: skip


def _act(page: Page, chosen: SimpleNamespace, undo: gr.Button, drop: gr.File) -> None:
    """Wire the buttons."""
    app, changed, deleted = page.app, page.library_changed, gr.State("")
    gr.on(
        [page.blocks.load, page.tab.select, changed.change], handler(undo_update_handler(app)), None, [deleted, undo],
        **ALWAYS_LAST, **PRIVATE,
    )  # fmt: skip
    chosen.candidates.select(
        handler(thumbnail_handler(app)), [chosen.name, chosen.offered, changed], changed,
        api_name="choose_thumbnail", **PRIVATE,
    )  # fmt: skip
    chosen.insert.click(handler(insert_handler(app)), [page.prompt, chosen.name], [page.prompt, page.tabs], **PRIVATE)
    chosen.export.click(
        handler(export_handler(app)), [chosen.name, chosen.form], chosen.exported, api_name="export",
        api_visibility="private",
    )  # fmt: skip
    chosen.delete.click(
        handler(delete_handler(app)), [chosen.name, changed], [chosen.name, chosen.panel, changed],
        api_name="delete", **PRIVATE,
    )  # fmt: skip
    undo.click(handler(restore_handler(app)), [deleted, changed], changed, **PRIVATE)
    drop.upload(handler(import_handler(app)), [drop, changed], [drop, changed], api_name="import", **PRIVATE)


def list_handler(app: App) -> Any:
    """The cards of a search."""

    def listing(words: str, sort: str, method: str, shown: int, chosen: str) -> list[Any]:
        found = app.library.find((words or "")[:200], sort, method)
        listed = found[:shown]
        if not found:
            return [NO_MATCH if app.library.entries() else EMPTY, gr.update(visible=False)]
        return [cards(listed, [app.problem(e) for e in listed], chosen), gr.update(visible=len(found) > shown)]

    return listing


def pick_handler(app: App) -> Any:
    """Details of the adapter whose card was clicked."""

    def pick(event: gr.EventData) -> list[Any]:
        entry = app.library.entry(str(getattr(event, "name", "")))
        app.library.hash_all([entry])
        problem = app.problem(entry)
        insert = gr.update(interactive=problem is None)
        delete = gr.update(interactive=entry.pack is None, value="Delete" if entry.pack is None else "Part of a pack")
        offered = app.library.images_with(entry) if app.may_change and entry.pack is None else []
        images = [app.hand_out(file) for file in offered]
        return [
            entry.name, gr.update(visible=True), details(entry, problem), gr.update(visible=False), insert, delete,
            gr.update(visible=bool(images)), images, offered,
        ]  # fmt: skip

    return pick


def thumbnail_handler(app: App) -> Any:
    """Use the clicked image as the adapter's thumbnail."""

    def choose(name: str, offered: list[Path], changes: int, event: gr.SelectData) -> int:
        app.require_changes()
        index = event.index
        if not isinstance(index, int) or not 0 <= index < len(offered):
            raise UserError("this image is no longer offered: open the adapter again")
        app.library.entry(name).choose_thumbnail(offered[index])
        return changes + 1

    return choose


def export_handler(app: App) -> Any:
    """Export a plain LoRA for download."""

    def export(name: str, form: str) -> Any:
        if app.engine.is_remote:
            raise UserError(ELSEWHERE)
        from ...conversion.export import export_lora  # late: it imports torch

        entry = app.library.entry(name)
        with app.download() as folder:
            target = folder / f"{safe_name(entry.name)}_{form}.safetensors"
            report = export_lora(entry.file, target, form)  # type: ignore[arg-type]
        label = f"rank {report.rank}, max error {report.max_error:.1e}"
        files = [str(file) for file in (report.path, *report.embeddings)]
        return gr.update(value=files if report.embeddings else files[0], visible=True, label=f"Exported: {label}")

    return export


def delete_handler(app: App) -> Any:
    """Move the chosen adapter to the trash folder; undo restores it."""

    def delete(name: str, changes: int) -> list[Any]:
        app.require_changes()
        app.library.delete(name)
        return ["", gr.update(visible=False), changes + 1]

    return delete


def undo_update_handler(app: App) -> Any:
    """Show the newest deletion that can be undone. It is read from disk, so a reload loses nothing."""

    def offer() -> list[Any]:
        newest = next(iter(app.library.deletions()), "")
        name = newest.partition("-")[2]
        return [newest, gr.update(visible=bool(newest) and app.may_change, value=f"Undo delete: restore {name}")]

    return offer


def restore_handler(app: App) -> Any:
    """Undo the newest deletion."""

    def restore(trash_id: str, changes: int) -> int:
        app.require_changes()
        app.library.restore(trash_id)
        return changes + 1

    return restore


def import_handler(app: App) -> Any:
    """Import dropped files and report why others were refused. Each header is checked first."""

    def import_files(files: list[str] | None, changes: int) -> list[Any]:
        app.require_changes()
        imported, refused = [], []
        for file in (files or [])[:MAX_IMPORTS]:
            try:
                imported.append(app.library.add(Path(file), Path(file).name).name)
            except UserError as error:
                refused.append(str(error))
        if imported:
            gr.Info(toast(f"Imported: {', '.join(imported)}"), duration=6)
        if refused:
            gr.Warning(toast(f"Not imported: {'; '.join(refused)}"), duration=15)
        return [None, changes + 1]

    return import_files
