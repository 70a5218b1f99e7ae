"""The Compare tab: an X/Y/Z grid of labeled images, and two of them side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import gradio as gr

from ...errors import UserError
from ...evaluation.axes import AXES, NONE, Cell
from ...evaluation.settings import GridConfig
from ...generation.settings import MAX_PROMPT, Sampling
from ..comparison import MAX_TEXT, NO_CHOICE, Comparison, build_axis, build_grid, compare, suggestion
from ..layout.cards import line
from ..layout.page import ALWAYS_LAST, UNQUEUED, Page, handler, run_buttons, run_key, stop_handler
from ..request import MAX_SEED, MAX_STEPS
from ..runs import Run
from ..state import App
from .adapter_sliders import usable_names, with_trigger_words
from .generate import to_int
from .generate_settings import defaults
from .generate_view import status

TITLE = "Compare"
WORK = "a comparison"
HINT = line("Choose what varies over columns and rows, then press Compare.")
INITIAL_AXES = (
    ("x", "Columns (X)", "seed", "1..4"), ("y", "Rows (Y)", "weight", "0, 0.5, 1"), ("z", "Grids (Z)", NO_CHOICE, ""),
)  # fmt: skip


def build(page: Page) -> None:
    """Settings and axes on the left, the grid and two images side by side on the right."""
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            form = _form(page)
        with gr.Column(scale=7, min_width=320):
            result = _result(page)
    _wire(page, form, result)


def _form(page: Page) -> SimpleNamespace:
    initial = defaults(page.app.engine)
    prompt = gr.Textbox(
        initial["prompt"], label="Prompt", lines=2, max_length=MAX_PROMPT, elem_id="compare-prompt",
    )  # fmt: skip
    adapter = gr.Dropdown(
        [NO_CHOICE, *usable_names(page)], value=None, label="Adapter", elem_id="compare-adapter", interactive=True
    )
    axes = []
    names = [name for name in AXES if name != "step" or not page.app.engine.is_remote]  # a server has no checkpoints
    for key, title, axis, suggested in INITIAL_AXES:
        with gr.Row():
            name = gr.Dropdown(
                [NO_CHOICE, *names], value=axis, label=title, min_width=140, scale=2, elem_id=f"compare-{key}",
                interactive=True,
            )  # fmt: skip
            values = gr.Textbox(
                suggested, label=f"{key.upper()} values", scale=5, min_width=180, max_length=MAX_TEXT,
                elem_id=f"compare-{key}-values", placeholder="1..4   or   0, 0.5, 1",
            )  # fmt: skip
        axes.append((name, values))
    with gr.Accordion("Settings for all cells", open=False):
        with gr.Row():
            weight = gr.Slider(-2, 2, 1, step=0.05, label="Weight", min_width=140)
            seed = gr.Number(1, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=100)
        with gr.Row():
            steps = gr.Slider(1, MAX_STEPS, initial["steps"], step=1, label="Steps", min_width=200)
            guidance = gr.Slider(0, 20, page.app.engine.guidance, step=0.5, label="CFG scale", min_width=200)
        negative = gr.Textbox("", label="Negative prompt", max_length=MAX_PROMPT)
    can_score = page.app.engine.is_embedded and not page.app.engine.is_remote
    scored = gr.Checkbox(can_score, label="Score subject and prompt fidelity", visible=can_score)
    with gr.Row():
        go = gr.Button("Compare", variant="primary", elem_id="compare-go")
        stop = gr.Button("Interrupt", variant="stop", visible=False, elem_id="compare-stop")
    return SimpleNamespace(
        prompt=prompt, adapter=adapter, axes=axes, weight=weight, seed=seed, steps=steps, guidance=guidance,
        negative=negative, scored=scored, go=go, stop=stop,
    )  # fmt: skip


def _result(page: Page) -> SimpleNamespace:
    pixels = ["pixels"] if page.app.engine.is_embedded else []
    status_line = gr.HTML(HINT, elem_id="compare-status")
    grid = gr.Image(
        label="Grid", show_label=False, type="filepath", format="png", interactive=False, visible=False,
        elem_id="compare-grid", buttons=["fullscreen"],
    )  # fmt: skip
    with gr.Row():
        png = gr.DownloadButton("Download PNG", visible=False, elem_id="compare-png")
        report = gr.DownloadButton("Download JSON", visible=False, elem_id="compare-json")
    with gr.Group(visible=False) as pair:
        with gr.Row():
            left = gr.Dropdown([], label="Left", interactive=True, elem_id="compare-left", min_width=140)
            right = gr.Dropdown([], label="Right", interactive=True, elem_id="compare-right", min_width=140)
        slider = gr.ImageSlider(
            label="Side by side", type="filepath", format="png", interactive=False, elem_id="compare-slider",
            elem_classes=pixels, max_height=512, buttons=["fullscreen"],
        )  # fmt: skip
    return SimpleNamespace(
        status=status_line, grid=grid, png=png, report=report, pair=pair, left=left, right=right, slider=slider,
        cells=gr.State([]),
    )  # fmt: skip


def _wire(page: Page, form: SimpleNamespace, result: SimpleNamespace) -> None:
    app = page.app
    fields = [form.prompt, form.adapter, *form.axes[1]]
    changes = [page.blocks.load, page.tab.select, page.library_changed.change]
    gr.on(changes, handler(refresh_handler(page)), fields, fields, **ALWAYS_LAST, **UNQUEUED)
    form.adapter.input(
        handler(trigger_handler(app)), [form.prompt, form.adapter], form.prompt, **ALWAYS_LAST, **UNQUEUED
    )
    for name, values in form.axes:
        name.input(
            handler(lambda n, a, p: suggestion(app, n or "", a or "", p or "")), [name, form.adapter, form.prompt],
            values, **ALWAYS_LAST, **UNQUEUED,
        )  # fmt: skip
    axes = [component for axis in form.axes for component in axis]
    outputs = [
        result.grid, result.png, result.report, result.pair, result.left, result.right, result.slider, result.cells,
    ]  # fmt: skip
    run = form.go.click(
        handler(compare_handler(app)),
        [form.prompt, form.adapter, form.weight, form.seed, form.steps, form.guidance, form.negative, form.scored,
         *axes],
        [form.go, form.stop, result.status, *outputs],
        api_name="compare", api_visibility="private", concurrency_limit=None, show_progress="hidden",
    )  # fmt: skip
    run_buttons(run, form.go, form.stop)
    form.stop.click(handler(stop_handler(app, Run.interrupt, WORK)), api_name="compare_stop", **UNQUEUED)
    gr.on(
        [result.left.input, result.right.input], handler(pick), [result.left, result.right, result.cells],
        result.slider, **ALWAYS_LAST, **UNQUEUED,
    )  # fmt: skip


def refresh_handler(page: Page) -> Any:
    """Update the choice of adapters. At first the newest is chosen; without any, the weight axis is removed."""
    add_trigger, initial = trigger_handler(page.app), defaults(page.app.engine)["prompt"]

    def refresh(prompt: str, adapter: str | None, y_axis: str, _: str) -> list[Any]:
        found = usable_names(page)
        choices = [NO_CHOICE, *found]
        if adapter in choices:
            return [gr.skip(), gr.update(choices=choices), gr.skip(), gr.skip()]
        chosen = found[0] if found else None
        y_updates = [NO_CHOICE, ""] if not found and y_axis == "weight" else [gr.skip(), gr.skip()]
        return [
            add_trigger(prompt, chosen) if prompt == initial else gr.skip(),
            gr.update(choices=choices, value=chosen),
            *y_updates,
        ]

    return refresh


def trigger_handler(app: App) -> Any:
    """Add the trigger words of the chosen adapter to the prompt."""

    def add_trigger(prompt: str, adapter: str | None) -> Any:
        info = app.library.entry(adapter).info if adapter and adapter != NO_CHOICE else None
        text = with_trigger_words(app, prompt or "", info) if info else prompt
        return gr.skip() if text == prompt else text

    return add_trigger


def compare_handler(app: App) -> Any:
    """The handler of the Compare button; a generator, so that closing the page stops the work."""

    def go(
        prompt: str, adapter: str, weight: float, seed: float, steps: float, guidance: float, negative: str,
        scored: bool, x: str, xs: str, y: str, ys: str, z: str, zs: str, request: gr.Request,
    ) -> Iterator[Any]:  # fmt: skip
        sampling = Sampling(to_int(steps, "steps"), float(guidance), negative or "")
        cell = Cell(sampling, prompt or "", weight=float(weight), seed=to_int(seed, "the seed"))
        grid = _grid_config(app, cell, adapter or NO_CHOICE, ((x, xs), (y, ys), (z, zs)))
        found: list[Comparison] = []
        run = Run(app.device, WORK, lambda run: found.append(compare(app, grid, adapter, bool(scored), run)))
        app.runs.put(run_key(request, WORK), run)
        for progress in run.follow():
            text, updates = status(progress), [gr.skip()] * 8
            if progress.state == "done":
                text, updates = line(f"{len(found[0].cells)} cells in {progress.seconds:.1f} s."), _show(app, found[0])
            elif progress.state == "stopped" and progress.images:
                cells = f"{len(progress.files)} of {progress.images} cells"
                kept = "" if app.engine.is_remote else " They are kept: Compare makes only the others."
                text = line(f"Interrupted with {cells} finished.{kept}")
            yield gr.update(visible=False), gr.update(visible=True), text, *updates

    return go


def _grid_config(app: App, cell: Cell, adapter: str, axes: tuple[tuple[str, str], ...]) -> GridConfig:
    built = [build_axis(app, name, values, adapter) for name, values in axes]
    if not any("adapter" in change for axis in built for change in axis.changes):
        if adapter in NONE and any(name == "weight" for name, _ in axes):
            raise UserError("the weight has no effect without an adapter: choose an adapter, or another axis")
        cell = replace(cell, **build_axis(app, "adapter", adapter, adapter).changes[0])
    return build_grid(app, cell, built)


def _show(app: App, result: Comparison) -> list[Any]:
    """Updates that show a finished grid."""
    labels = [label for label, _ in result.cells]
    cells = [(label, app.hand_out(file)) for label, file in result.cells]
    first, last = 0, result.row_end
    return [
        gr.update(value=str(result.image), visible=True),
        gr.update(value=str(result.image), visible=True),
        gr.update(value=str(result.report), visible=True),
        gr.update(visible=True),
        gr.update(choices=[(label, n) for n, label in enumerate(labels)], value=first),
        gr.update(choices=[(label, n) for n, label in enumerate(labels)], value=last),
        (cells[first][1], cells[last][1]),
        cells,
    ]


def pick(left: int | None, right: int | None, cells: list[tuple[str, str]]) -> Any:
    """The images of the two chosen cells."""
    if left is None or right is None:
        return gr.skip()
    return cells[left][1], cells[right][1]
