"""The Library tab: cards of adapters; look, search, insert, import, export, delete and undo."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr

from ...adapters import PRESETS
from ...conversion.export import export_lora
from ...errors import UserError
from ..layout.cards import EMPTY, NOTHING, cards, facts
from ..layout.page import HIDDEN, LAST, QUIET, Page, handler, toast
from ..library import SORTS, safe_name
from ..state import App
from .rack import inserter

TITLE = "Library"
PAGE_SIZE = 60
METHODS = ("all", *PRESETS)
FORMATS = (("diffusers", "diffusers"), ("kohya: A1111, ComfyUI …", "kohya"))
PICK = """
element.addEventListener('click', (event) => {
  const card = event.target.closest('[data-name]');
  if (card) trigger('click', {name: card.dataset.name});
});
"""
SHOW_CHOSEN = "() => { if (innerWidth < 640) document.querySelector('#library-chosen')?.scrollIntoView(); }"
MAX_IMPORTS = 50


def build(page: Page) -> None:
    """Search above the cards; what is chosen is told beside them, on a phone before them."""
    app = page.app
    with gr.Row():
        words = gr.Textbox(label="Search", placeholder="name, trigger, base, hash", elem_id="search", scale=3)
        sort = gr.Dropdown(list(SORTS), value=SORTS[0], label="Sort by", min_width=140)
        method = gr.Dropdown(list(METHODS), value="all", label="Method", min_width=140, allow_custom_value=True)
    with gr.Row(elem_id="library-areas"):
        with gr.Column(elem_id="library-cards"):
            grid = gr.HTML("", elem_id="cards", js_on_load=PICK)
            more = gr.Button("Show more", visible=False)
        with gr.Column(visible=False, elem_id="library-chosen") as panel:
            chosen = _panel(app, panel)
        with gr.Column(elem_id="library-import"):
            undo = gr.Button("Undo the deletion", visible=False, elem_id="undo")
            drop = gr.File(
                label="Import adapters or packs (.safetensors)", file_count="multiple",
                file_types=[".safetensors"], height=120, elem_id="import", visible=app.config.may_change,
            )  # fmt: skip
    shown = gr.State(PAGE_SIZE)
    query = [words, sort, method, shown, chosen.name]
    changes = [part.change for part in (*query, page.library_changed)]
    gr.on([page.blocks.load, page.tab.select, *changes], handler(lister(app)), query, [grid, more], **LAST, **HIDDEN)
    more.click(lambda n: n + PAGE_SIZE, shown, shown, **HIDDEN)
    picked = grid.click(
        handler(picker(app)), None,
        [chosen.name, panel, chosen.about, chosen.exported, chosen.insert, chosen.delete, chosen.choose,
         chosen.candidates, chosen.offered],
        api_name="pick", **HIDDEN,
    )  # fmt: skip
    picked.then(None, js=SHOW_CHOSEN, **QUIET)
    _act(page, chosen, undo, drop)


def _panel(app: App, panel: gr.Column) -> SimpleNamespace:
    """What is known of the chosen adapter and can be done with it."""
    about = gr.HTML("", elem_id="about")
    insert = gr.Button("Use in the prompt", variant="primary", elem_id="insert")
    form = gr.Dropdown(list(FORMATS), value="diffusers", label="Export as a plain LoRA for")
    export = gr.Button("Export")
    exported = gr.File(label="Exported", visible=False, interactive=False, height=100)
    with gr.Accordion(
        "Choose its picture: click one that was made with it", open=True, visible=False, elem_id="choose-picture"
    ) as choose:
        candidates = gr.Gallery(
            label="Pictures made with it", show_label=False, columns=4, height=150, allow_preview=False,
            format="png", interactive=False, buttons=[], elem_classes=["pixels"] if app.engine.is_embedded else [],
        )  # fmt: skip
    delete = gr.Button("Delete", variant="stop", visible=app.config.may_change, elem_id="delete")
    return SimpleNamespace(
        panel=panel, about=about, insert=insert, form=form, export=export, exported=exported, choose=choose,
        candidates=candidates, delete=delete, name=gr.State(""), offered=gr.State([]),
    )  # fmt: skip


def _act(page: Page, chosen: SimpleNamespace, undo: gr.Button, drop: gr.File) -> None:
    """Wire what changes something."""
    app, changed, deleted = page.app, page.library_changed, gr.State("")
    gr.on(
        [page.blocks.load, page.tab.select, changed.change], handler(undoer(app)), None, [deleted, undo],
        **LAST, **HIDDEN,
    )  # fmt: skip
    chosen.candidates.select(
        handler(chooser(app)), [chosen.name, chosen.offered, changed], changed, api_name="choose_picture", **HIDDEN
    )
    chosen.insert.click(handler(inserter(app)), [page.prompt, chosen.name], [page.prompt, page.tabs], **HIDDEN)
    chosen.export.click(
        handler(exporter(app)), [chosen.name, chosen.form], chosen.exported, api_name="export", api_visibility="private"
    )
    chosen.delete.click(
        handler(deleter(app)), [chosen.name, changed], [chosen.name, chosen.panel, changed],
        api_name="delete", **HIDDEN,
    )  # fmt: skip
    undo.click(handler(restorer(app)), [deleted, changed], changed, **HIDDEN)
    drop.upload(handler(importer(app)), [drop, changed], [drop, changed], api_name="import", **HIDDEN)


def lister(app: App) -> Any:
    """The cards of a query."""

    def listing(words: str, sort: str, method: str, shown: int, chosen: str) -> list[Any]:
        found = app.library.find((words or "")[:200], sort, method)
        part = found[:shown]
        if not found:
            return [NOTHING if app.library.entries() else EMPTY, gr.update(visible=False)]
        return [cards(part, [app.misfit(e) for e in part], chosen), gr.update(visible=len(found) > shown)]

    return listing


def picker(app: App) -> Any:
    """What is known of the adapter whose card was pressed."""

    def pick(event: gr.EventData) -> list[Any]:
        entry = app.library.entry(str(event._data.get("name", "")))
        app.library.hash_all([entry])
        misfit = app.misfit(entry)
        usable = gr.update(interactive=misfit is None)
        whole = gr.update(interactive=entry.pack is None, value="Delete" if entry.pack is None else "Part of a pack")
        offered = app.library.pictures_with(entry) if app.config.may_change and entry.pack is None else []
        shown = [app.hand_out(file) for file in offered]
        return [
            entry.name, gr.update(visible=True), facts(entry, misfit), gr.update(visible=False), usable, whole,
            gr.update(visible=bool(shown)), shown, offered,
        ]  # fmt: skip

    return pick


def chooser(app: App) -> Any:
    """The pressed picture is the adapter's from now on."""

    def choose(name: str, offered: list[Path], changes: int, event: gr.SelectData) -> int:
        app.require_changes()
        number = event.index
        if not isinstance(number, int) or not 0 <= number < len(offered):
            raise UserError("that picture is not among those shown: open the adapter again")
        app.library.entry(name).choose_thumbnail(offered[number])
        return changes + 1

    return choose


def exporter(app: App) -> Any:
    """Write a plain LoRA and offer it for download."""

    def export(name: str, form: str) -> Any:
        entry = app.library.entry(name)
        target = app.private_folder() / f"{safe_name(entry.name)}_{form}.safetensors"
        report = export_lora(entry.file, target, form)  # type: ignore[arg-type]
        label = f"rank {report.rank}, largest error {report.max_error:.1e}"
        files = [str(file) for file in (report.path, *report.embeddings)]
        return gr.update(value=files if report.embeddings else files[0], visible=True, label=f"Exported: {label}")

    return export


def deleter(app: App) -> Any:
    """Move the chosen adapter to the bin, from where Undo brings it back."""

    def delete(name: str, changes: int) -> list[Any]:
        app.require_changes()
        app.library.delete(name)
        return ["", gr.update(visible=False), changes + 1]

    return delete


def undoer(app: App) -> Any:
    """The newest deletion that can be undone, read from disk: a reload or another page forgets none."""

    def offer() -> list[Any]:
        newest = next(iter(app.library.deletions()), "")
        name = newest.partition("-")[2]
        return [newest, gr.update(visible=bool(newest) and app.config.may_change, value=f"Undo: bring {name} back")]

    return offer


def restorer(app: App) -> Any:
    """Undo the newest deletion; then the one before it is offered."""

    def restore(ticket: str, changes: int) -> int:
        app.require_changes()
        app.library.restore(ticket)
        return changes + 1

    return restore


def importer(app: App) -> Any:
    """Take dropped files in, each after a look at its header; those that will not do are named with the reason."""

    def take(files: list[str] | None, changes: int) -> list[Any]:
        app.require_changes()
        taken, refused = [], []
        for file in (files or [])[:MAX_IMPORTS]:
            try:
                taken.append(app.library.add(Path(file), Path(file).name).name)
            except UserError as error:
                refused.append(str(error))
        if taken:
            gr.Info(toast(", ".join(taken)), title="Imported", duration=6)
        if refused:
            gr.Warning(toast("; ".join(refused)), title="Not imported", duration=15)
        return [None, changes + 1]

    return take
