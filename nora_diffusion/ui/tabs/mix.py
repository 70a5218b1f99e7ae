"""The Mix tab: combine adapters into one, and generate a batch in which each image has its own adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

import gradio as gr

from ...composition.mixing import MixReport, mix_files
from ...composition.modes import Mode
from ...errors import UserError
from ...generation.settings import MAX_PROMPT, Sampling, check_range
from ...generation.tags import Tag, parse_tags
from ..layout.cards import table
from ..layout.page import PRIVATE, UNQUEUED, Page, handler, run_buttons, run_key, stop_handler
from ..request import LIMITS, MAX_IMAGES, MAX_SEED, ActiveAdapter, Request
from ..runs import Run
from ..state import App
from .adapter_sliders import build_sliders
from .generate import find_adapter, first_seed, follow, to_int
from .generate_settings import defaults

TITLE = "Mix"
WORK = "a batch"
MODES = {
    "cat: exact sum, ranks add up": "cat",
    "linear: exact sum, for adapters with a shared basis": "linear",
    "svd: best approximation of the sum at a given rank": "svd",
    "ties: prune, elect signs, average": "ties",
    "dare_ties: drop at random, elect signs": "dare_ties",
    "dare_linear: drop at random, sum": "dare_linear",
    "magnitude_prune: keep the largest values, sum": "magnitude_prune",
}
MIN_ADAPTERS = 2
MAX_RANK = 4096
DENSITIES = (0.05, 1)


def build(page: Page) -> None:
    """The recipe of a mix on the left, a batch on the right."""
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            _recipe(page)
        with gr.Column(scale=1, min_width=320):
            _batch(page)


def _recipe(page: Page) -> None:
    app = page.app
    gr.Markdown("### Mix adapters into one")
    recipe = gr.Textbox(
        label="Recipe", placeholder="<lora:dog:0.8> <lora:hat:0.6>", elem_id="recipe", max_length=MAX_PROMPT,
        info="Add adapters below, type tags, or copy them from the prompt",
    )  # fmt: skip
    copy = gr.Button("Copy adapters from the prompt", size="sm", elem_id="recipe-take")
    build_sliders(page, recipe, "recipe-add", one_weight=True)
    with gr.Row():
        mode = gr.Dropdown(list(MODES.items()), value="cat", label="Mode", min_width=220)
        name = gr.Textbox("mix", label="Name of the mix", max_length=64, min_width=140, elem_id="mix-name")
    with gr.Accordion("Mode settings", open=False):
        with gr.Row():
            rank = gr.Number(0, label="Rank", info="0 = sum of the ranks", precision=0, minimum=0,
                             maximum=MAX_RANK, min_width=120)  # fmt: skip
            seed = gr.Number(0, label="Seed", info="For DARE's random drops", precision=0, minimum=0,
                             maximum=MAX_SEED, min_width=120)  # fmt: skip
        density = gr.Slider(*DENSITIES, 0.5, step=0.05, label="Density", info="Fraction of values kept by pruning")
    go = gr.Button("Mix and save to library", variant="primary", elem_id="mix", interactive=app.may_change)
    report = gr.HTML("", elem_id="mix-report")
    copy.click(handler(tags_only), page.prompt, recipe, **PRIVATE)
    go.click(
        handler(mix_handler(app)), [recipe, mode, name, rank, density, seed, page.library_changed],
        [report, page.library_changed], api_name="mix", api_visibility="private",
    )  # fmt: skip


def tags_only(prompt: str) -> str:
    """The tags of a prompt without its text."""
    return " ".join(map(str, parse_tags(prompt or "")[1]))


def mix_handler(app: App) -> Any:
    """Mix the adapters of a recipe into a new adapter of the library."""

    def mix(
        recipe: str, mode: str, name: str, rank: float, density: float, seed: float, changes: int
    ) -> tuple[str, int]:
        app.require_changes()
        tags = parse_tags((recipe or "")[: MAX_PROMPT + 1])[1]
        if len(tags) < MIN_ADAPTERS:
            raise UserError("a mix needs at least two adapters: add them to the recipe")
        if mode not in get_args(Mode):
            raise UserError(f"the mode {mode!r} is unknown: choose one of {', '.join(get_args(Mode))}")
        check_one_weight(tags, "mix")
        adapters = [(find_adapter(app, tag, {}).path, tag.unet) for tag in tags]
        check_mixable(app, [tag.name for tag in tags])
        settings = {
            "rank": to_int(rank, "the rank") or None, "density": float(density), "seed": to_int(seed, "the seed"),
        }  # fmt: skip
        check_range("rank", settings["rank"] or 0, 0, MAX_RANK)
        check_range("density", settings["density"] or 0, *DENSITIES)
        check_range("seed", settings["seed"] or 0, 0, MAX_SEED)
        with app.library.reserved(name or "mix") as folder:
            report = mix_files(adapters, folder, mode, **settings)  # type: ignore[arg-type]
        return describe(report), changes + 1

    return mix


def check_one_weight(tags: Sequence[Tag], target: str) -> None:
    """Raise :class:`UserError` for a tag with different weights on the denoiser and on text encoders."""
    uneven = next((tag.name for tag in tags if tag.unet != tag.te), None)
    if uneven:
        raise UserError(f"{uneven!r} has two weights; in a {target} each adapter has one: write <lora:{uneven}:0.8>")


def check_mixable(app: App, names: Sequence[str]) -> None:
    """Raise :class:`UserError` for adapters that cannot be mixed.

    The update of a mixture with a router depends on the input, so it cannot be saved as one adapter. Files of other
    tools can only be loaded into a pipeline.
    """
    for name in names:
        info = app.library.entry(name).info
        if info and not info.is_ours:
            raise UserError(
                f"{name!r} is a plain LoRA ({info.kind}), which cannot be mixed: use its tag in the prompt, or mix the "
                "adapter that it was exported from"
            )
        if info and any(config.router != "none" for config in info.configs.values()):
            raise UserError(f"{name!r} has a router and cannot be mixed into one adapter: use its tag in the prompt")


def describe(report: MixReport) -> str:
    """The report of a mix: rank, energy kept, error, overlaps, warnings."""
    rows = [
        ("saved as", report.name),
        ("rank", report.rank),
        ("energy kept", f"{100 * report.kept:.1f}%"),
        ("relative error", f"{report.error:.2g}"),
        *((f"overlap of {one} and {two}", f"{score:.2f}") for (one, two), score in report.overlaps.items()),
        *(("warning", text) for text in report.warnings),
    ]
    return table(rows)


def _batch(page: Page) -> None:
    app = page.app
    gr.Markdown("### Different adapters in one batch")
    lines = gr.Textbox(
        label="One prompt per line, each with its own adapters", lines=5, max_lines=16, max_length=8 * MAX_PROMPT,
        placeholder="a sks dog on the beach <lora:dog:1>\na zwx hat on the beach <lora:hat:0.8>\na cat on the beach",
        elem_id="batch",
    )  # fmt: skip
    with gr.Row():
        steps = gr.Number(defaults(app.engine)["steps"], label="Steps", precision=0, minimum=1,
                          maximum=LIMITS["steps"][1], min_width=90)  # fmt: skip
        guidance = gr.Number(app.engine.guidance, label="CFG scale", minimum=0, maximum=LIMITS["guidance"][1],
                             step=0.5, min_width=90)  # fmt: skip
        seed = gr.Number(-1, label="Seed (-1 = random)", precision=0, minimum=-1, maximum=MAX_SEED, min_width=160)
    with gr.Row():
        go = gr.Button("Generate batch", variant="primary", elem_id="batch-go")
        interrupt = gr.Button("Interrupt", variant="stop", visible=False)
    status_line = gr.HTML("", elem_id="batch-status", visible=False)
    gallery = gr.Gallery(
        label="Batch", format="png", columns=3, object_fit="contain", height="auto", elem_id="batch-gallery",
        elem_classes=["pixels"] if app.engine.is_embedded else [], buttons=["download", "fullscreen"], visible=False,
    )  # fmt: skip
    run = go.click(
        handler(batch_handler(app)), [lines, steps, guidance, seed], [go, interrupt, status_line, gallery],
        concurrency_limit=None, **PRIVATE,
    )  # fmt: skip
    run_buttons(run, go, interrupt)
    interrupt.click(handler(stop_handler(app, Run.interrupt, WORK)), **UNQUEUED)


def batch_handler(app: App) -> Any:
    """Generate all lines in one pipeline call."""

    def batch(
        lines: str, steps: float, guidance: float, seed: float | None, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        order, rows = read_batch(app, lines or "", steps, guidance, first_seed(seed))
        out = app.library.images
        run = Run(app.device, WORK, lambda run: app.engine.make_batch(order, rows, out, run))
        app.runs.put(run_key(request, WORK), run)
        captions = [f"{n}. {prompt}" for n, (prompt, _) in enumerate(order.images, 1)]
        for go, interrupt, _, text, _, items in follow(app, run, captions):
            yield go, interrupt, gr.update(value=text, visible=True), items

    return batch


def read_batch(
    app: App, lines: str, steps: float, guidance: float, seed: int
) -> tuple[Request, list[list[ActiveAdapter]]]:
    """The request for a batch, and the adapters of each row. All rows have the same seed, so they can be compared."""
    texts = [line.strip() for line in lines.splitlines() if line.strip()]
    if not 1 <= len(texts) <= MAX_IMAGES:
        raise UserError(f"the batch has {len(texts)} lines: write 1 to {MAX_IMAGES} prompts, one per line")
    images, rows = [], []
    for text in texts:
        clean, tags = parse_tags(text)
        check_one_weight(tags, "batch")
        images.append((clean, seed))
        rows.append([find_adapter(app, tag, {}) for tag in tags])
    adapters = {adapter.name: adapter for row in rows for adapter in row}
    request = Request(tuple(images), Sampling(to_int(steps, "steps"), float(guidance)), tuple(adapters.values()))
    request.check()
    return request, rows
