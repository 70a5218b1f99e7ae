"""The Compare tab: the same picture under changing settings, as a labeled grid and side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import gradio as gr

from ...errors import UserError
from ...evaluation.axes import NONE, Cell
from ...evaluation.grid import GridConfig
from ...generation.sampling import MAX_PROMPT, Sampling
from ..comparison import AXES, BASE_ALONE, Comparison, build_axis, build_grid, compare, suggestion
from ..layout.cards import line
from ..layout.page import LAST, QUIET, Page, handler, run_buttons, stopper, who
from ..request import MAX_STEPS
from ..runs import Run
from ..state import App
from .generate import whole
from .generate_settings import defaults
from .generate_view import status
from .rack import called, names

TITLE = "Compare"
WORK = "a comparison"
HINT = line("Choose what changes along columns and rows, then press Compare.")


def build(page: Page) -> None:
    """Axes on the left, the grid and the slider on the right."""
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            form = _form(page)
        with gr.Column(scale=7, min_width=320):
            shown = _result(page)
    _wire(page, form, shown)


def _form(page: Page) -> SimpleNamespace:
    first = defaults(page.app.engine)
    prompt = gr.Textbox(
        first["prompt"], label="Prompt", lines=2, max_length=MAX_PROMPT, elem_id="compare-prompt",
    )  # fmt: skip
    adapter = gr.Dropdown(
        [BASE_ALONE, *names(page)], value=None, label="Adapter", elem_id="compare-adapter", interactive=True
    )
    axes = []
    for key, title, start in (("x", "Columns", "seed"), ("y", "Rows", "weight"), ("z", "Sheets", BASE_ALONE)):
        with gr.Row():
            name = gr.Dropdown(
                [BASE_ALONE, *AXES], value=start, label=title, min_width=140, scale=2, elem_id=f"compare-{key}",
                interactive=True,
            )  # fmt: skip
            values = gr.Textbox(
                {"seed": "1..4", "weight": "0, 0.5, 1"}.get(start, ""), label=f"Values of the {title.lower()}", scale=5,
                min_width=180, max_length=4000, elem_id=f"compare-{key}-values", placeholder="1..4   or   0, 0.5, 1",
            )  # fmt: skip
        axes.append((name, values))
    with gr.Accordion("Settings of all cells", open=False):
        with gr.Row():
            weight = gr.Slider(-2, 2, 1, step=0.05, label="Weight", min_width=140)
            seed = gr.Number(1, label="Seed", precision=0, minimum=0, min_width=100)
        with gr.Row():
            steps = gr.Slider(1, MAX_STEPS, first["steps"], step=1, label="Steps", min_width=140)
            guidance = gr.Slider(0, 20, page.app.engine.guidance, step=0.5, label="Guidance", min_width=140)
        negative = gr.Textbox("", label="Negative prompt", max_length=MAX_PROMPT)
    scored = gr.Checkbox(
        page.app.engine.is_embedded, label="Score the cells by the small judge", visible=page.app.engine.is_embedded
    )
    with gr.Row():
        go = gr.Button("Compare", variant="primary", elem_id="compare-go")
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="compare-stop")
    return SimpleNamespace(
        prompt=prompt, adapter=adapter, axes=axes, weight=weight, seed=seed, steps=steps, guidance=guidance,
        negative=negative, scored=scored, go=go, stop=stop,
    )  # fmt: skip


def _result(page: Page) -> SimpleNamespace:
    pixels = ["pixels"] if page.app.engine.is_embedded else []
    said = gr.HTML(HINT, elem_id="compare-status")
    sheet = gr.Image(
        label="Grid", type="filepath", format="png", interactive=False, visible=False, elem_id="compare-sheet",
        buttons=["fullscreen"],
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
        said=said, sheet=sheet, png=png, report=report, pair=pair, left=left, right=right, slider=slider,
        cells=gr.State([]),
    )  # fmt: skip


def _wire(page: Page, form: SimpleNamespace, shown: SimpleNamespace) -> None:
    app = page.app
    parts = [form.prompt, form.adapter, *form.axes[1]]
    gr.on(
        [page.blocks.load, page.tab.select, page.library_changed.change], handler(offerer(page)), parts, parts,
        **LAST, **QUIET,
    )  # fmt: skip
    form.adapter.input(handler(speaker(app)), [form.prompt, form.adapter], form.prompt, **LAST, **QUIET)
    for name, values in form.axes:
        name.input(
            handler(lambda n, a, p: suggestion(app, n or "", a or "", p or "")), [name, form.adapter, form.prompt],
            values, **LAST, **QUIET,
        )  # fmt: skip
    texts = [part for axis in form.axes for part in axis]
    results = [shown.sheet, shown.png, shown.report, shown.pair, shown.left, shown.right, shown.slider, shown.cells]
    run = form.go.click(
        handler(comparer(app)),
        [form.prompt, form.adapter, form.weight, form.seed, form.steps, form.guidance, form.negative, form.scored,
         *texts],
        [form.go, form.stop, shown.said, *results],
        api_name="compare", api_visibility="private", concurrency_limit=None, show_progress="hidden",
    )  # fmt: skip
    run_buttons(run, form.go, form.stop)
    form.stop.click(handler(stopper(app, Run.interrupt, WORK)), api_name="compare_stop", **QUIET)
    gr.on(
        [shown.left.input, shown.right.input], handler(pick), [shown.left, shown.right, shown.cells], shown.slider,
        **LAST, **QUIET,
    )  # fmt: skip


def offerer(page: Page) -> Any:
    """The adapters to choose from, the newest one chosen at first; without one there is no weight to compare."""
    speak, first = speaker(page.app), defaults(page.app.engine)["prompt"]

    def offer(prompt: str, adapter: str | None, rows: str, _: str) -> list[Any]:
        found = names(page)
        choices = [BASE_ALONE, *found]
        if adapter in choices:
            return [gr.skip(), gr.update(choices=choices), gr.skip(), gr.skip()]
        chosen = found[0] if found else None
        rest = [BASE_ALONE, ""] if not found and rows == "weight" else [gr.skip(), gr.skip()]
        return [
            speak(prompt, chosen) if prompt == first else gr.skip(),
            gr.update(choices=choices, value=chosen),
            *rest,
        ]

    return offer


def speaker(app: App) -> Any:
    """The prompt with the words that call the chosen adapter's subject."""

    def speak(prompt: str, adapter: str | None) -> Any:
        info = app.library.entry(adapter).info if adapter and adapter != BASE_ALONE else None
        words = called(app, prompt or "", info) if info else prompt
        return gr.skip() if words == prompt else words

    return speak


def comparer(app: App) -> Any:
    """The handler of the button; a generator, so that a closed page ends the work."""

    def go(
        prompt: str, adapter: str, weight: float, seed: float, steps: float, guidance: float, negative: str,
        scored: bool, x: str, xs: str, y: str, ys: str, z: str, zs: str, request: gr.Request,
    ) -> Iterator[Any]:  # fmt: skip
        sampling = Sampling(whole(steps, "steps"), float(guidance), negative or "")
        cell = Cell(sampling, prompt or "", weight=float(weight), seed=whole(seed, "the seed"))
        grid = _plan(app, cell, adapter or BASE_ALONE, ((x, xs), (y, ys), (z, zs)))
        found: list[Comparison] = []
        run = Run(app.device, WORK, lambda run: found.append(compare(app, grid, adapter, bool(scored), run)))
        app.runs.put(who(request, WORK), run)
        for progress in run.follow():
            over = progress.over
            said = status(progress) if not (over and found) else _done(found[0], progress.seconds)
            results = _results(app, found[0]) if over and found else [gr.skip()] * 8
            yield gr.update(visible=False), gr.update(visible=True), said, *results

    return go


def _plan(app: App, cell: Cell, adapter: str, axes: tuple[tuple[str, str], ...]) -> GridConfig:
    built = [build_axis(app, name, values, adapter) for name, values in axes]
    if not any("adapter" in change for axis in built for change in axis.changes):
        if adapter in NONE and any(name == "weight" for name, _ in axes):
            raise UserError("a weight changes nothing without an adapter: choose one, or compare something else")
        cell = replace(cell, **build_axis(app, "adapter", adapter, adapter).changes[0])
    return build_grid(app, cell, built)


def _done(result: Comparison, seconds: float) -> str:
    return line(f"{len(result.cells)} cells in {seconds:.1f} s.")


def _results(app: App, result: Comparison) -> list[Any]:
    labels = [label for label, _ in result.cells]
    cells = [(label, app.hand_out(file)) for label, file in result.cells]
    first, last = 0, result.across
    return [
        gr.update(value=str(result.sheet), visible=True),
        gr.update(value=str(result.sheet), visible=True),
        gr.update(value=str(result.report), visible=True),
        gr.update(visible=True),
        gr.update(choices=[(label, n) for n, label in enumerate(labels)], value=first),
        gr.update(choices=[(label, n) for n, label in enumerate(labels)], value=last),
        (cells[first][1], cells[last][1]),
        cells,
    ]


def pick(left: int | None, right: int | None, cells: list[tuple[str, str]]) -> Any:
    """The two chosen cells."""
    if left is None or right is None:
        return gr.skip()
    return cells[left][1], cells[right][1]
