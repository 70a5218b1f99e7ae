"""The Mix tab: several adapters become one, and a batch in which every picture has adapters of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

import gradio as gr

from ...composition.mixing import MixReport, mix_files
from ...composition.modes import Mode
from ...errors import UserError
from ...generation.sampling import MAX_PROMPT, Sampling
from ...generation.tags import parse_tags
from ..layout.cards import table
from ..layout.page import HIDDEN, Page, handler, run_buttons, stopper, who
from ..library import safe_name
from ..request import MAX_PICTURES, Request, Wanted
from ..runs import Progress, Run
from ..state import App
from .generate import first_seed, follow, wanted, whole
from .generate_settings import defaults
from .generate_view import status
from .rack import build_rack

TITLE = "Mix"
WORK = "a batch"
MODES = {
    "cat: exact sum, ranks add up": "cat",
    "linear: exact sum inside one shared basis": "linear",
    "svd: best sum of a chosen rank": "svd",
    "ties: prune, vote on signs, average": "ties",
    "dare_ties: drop at random, vote on signs": "dare_ties",
    "dare_linear: drop at random, add": "dare_linear",
    "magnitude_prune: keep the largest, add": "magnitude_prune",
}
LEAST = 2


def build(page: Page) -> None:
    """A recipe on the left, many subjects at once on the right."""
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            _recipe(page)
        with gr.Column(scale=1, min_width=320):
            _batch(page)


def _recipe(page: Page) -> None:
    app = page.app
    gr.Markdown("### One adapter of several")
    recipe = gr.Textbox(
        label="Recipe", placeholder="<lora:dog:0.8> <lora:hat:0.6>", elem_id="recipe", max_length=MAX_PROMPT,
        info="Choose adapters below, write tags, or take those of the prompt",
    )  # fmt: skip
    take = gr.Button("Take the adapters of the prompt", size="sm", elem_id="recipe-take")
    build_rack(page, recipe, "recipe-add")
    with gr.Row():
        mode = gr.Dropdown(list(MODES.items()), value="cat", label="Mode", min_width=220)
        name = gr.Textbox("mix", label="Name of the mix", max_length=64, min_width=140, elem_id="mix-name")
    with gr.Accordion("Settings of the modes", open=False), gr.Row():
        rank = gr.Number(0, label="Rank", info="0: the sum of the parts' ranks", precision=0, minimum=0, min_width=120)
        density = gr.Slider(0.05, 1, 0.5, step=0.05, label="Density", info="Share kept by pruning", min_width=140)
        seed = gr.Number(0, label="Seed", info="Of what DARE drops", precision=0, minimum=0, min_width=120)
    go = gr.Button("Mix and save in the library", variant="primary", elem_id="mix", interactive=app.config.may_change)
    report = gr.HTML("", elem_id="mix-report")
    take.click(handler(tags_only), page.prompt, recipe, **HIDDEN)
    go.click(
        handler(mixer(app)), [recipe, mode, name, rank, density, seed, page.library_changed],
        [report, page.library_changed], api_name="mix", api_visibility="private",
    )  # fmt: skip


def tags_only(prompt: str) -> str:
    """The tags of a prompt, without its words."""
    return " ".join(map(str, parse_tags(prompt or "")[1]))


def mixer(app: App) -> Any:
    """Mix the files that a recipe names into a new adapter of the library."""

    def mix(
        recipe: str, mode: str, name: str, rank: float, density: float, seed: float, changes: int
    ) -> tuple[str, int]:
        app.require_changes()
        tags = parse_tags((recipe or "")[: MAX_PROMPT + 1])[1]
        if len(tags) < LEAST:
            raise UserError("a mix needs at least two adapters: add them to the recipe")
        if mode not in get_args(Mode):
            raise UserError(f"the mode {mode!r} is unknown: choose one of {', '.join(get_args(Mode))}")
        uneven = next((tag.name for tag in tags if tag.unet != tag.te), None)
        if uneven:
            raise UserError(f"{uneven!r} has two weights; in a mix each adapter has one: write <lora:{uneven}:0.8>")
        parts = [(wanted(app, tag, {}).path, tag.unet) for tag in tags]
        refuse_unmixable(app, [tag.name for tag in tags])
        folder = app.library.free_folder(safe_name(name or "mix"))
        settings = {"rank": whole(rank, "the rank") or None, "density": float(density), "seed": whole(seed, "the seed")}
        report = mix_files(parts, folder, mode, **settings)  # type: ignore[arg-type]
        return describe(report), changes + 1

    return mix


def refuse_unmixable(app: App, names: Sequence[str]) -> None:
    """A mixture with a router decides anew at each input, so there is no one update that could be saved; the files of
    other tools are read by a pipeline only."""
    for name in names:
        info = app.library.entry(name).info
        if info and info.kind != "nora":
            raise UserError(
                f"{name!r} is a plain LoRA ({info.kind}), which cannot be mixed: use its tag in the prompt, or mix the "
                "adapter that it was exported from"
            )
        if info and any(config.router != "none" for config in info.configs.values()):
            raise UserError(f"{name!r} has a router and cannot become part of one adapter: use its tag in the prompt")


def describe(report: MixReport) -> str:
    """What came out: rank, what was kept, and who overlaps with whom."""
    rows = [
        ("saved as", report.name),
        ("rank", report.rank),
        ("kept", f"{100 * report.kept:.1f}% of the sum's energy"),
        ("error", f"{report.error:.1e} of the sum's norm"),
        *((f"overlap of {one} and {two}", f"{score:.2f}") for (one, two), score in report.overlaps.items()),
        *(("warning", text) for text in report.warnings),
    ]
    return table(rows)


def _batch(page: Page) -> None:
    app = page.app
    gr.Markdown("### Many subjects in one batch")
    lines = gr.Textbox(
        label="One prompt a line, each with its own adapters", lines=5, max_lines=16, max_length=8 * MAX_PROMPT,
        placeholder="a sks dog on the beach <lora:dog:1>\na zwx hat on the beach <lora:hat:0.8>\na cat on the beach",
        elem_id="batch",
    )  # fmt: skip
    with gr.Row():
        steps = gr.Number(defaults(app.engine)["steps"], label="Steps", precision=0, minimum=1, min_width=90)
        guidance = gr.Number(app.engine.guidance, label="Guidance", minimum=0, step=0.5, min_width=90)
        seed = gr.Number(-1, label="Seed of all, -1: random", precision=0, minimum=-1, min_width=160)
    with gr.Row():
        go = gr.Button("Generate the batch", variant="primary", elem_id="batch-go")
        interrupt = gr.Button("Interrupt", variant="stop", visible=False)
    said = gr.HTML(status(Progress(message=" "), idle=False), elem_id="batch-status", visible=False)
    gallery = gr.Gallery(
        label="Batch", format="png", columns=3, object_fit="contain", height="auto", elem_id="batch-gallery",
        elem_classes=["pixels"] if app.engine.is_embedded else [], buttons=["download", "fullscreen"], visible=False,
    )  # fmt: skip
    run = go.click(
        handler(batcher(app)), [lines, steps, guidance, seed], [go, interrupt, said, gallery],
        concurrency_limit=None, **HIDDEN,
    )  # fmt: skip
    run_buttons(run, go, interrupt)
    interrupt.click(handler(stopper(app, Run.interrupt, WORK)), None, None, queue=False, **HIDDEN)


def batcher(app: App) -> Any:
    """One pass of the pipeline for all lines."""

    def batch(
        lines: str, steps: float, guidance: float, seed: float | None, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        order, rows = read_batch(app, lines or "", steps, guidance, first_seed(seed))
        out = app.library.pictures
        run = Run(app.device, WORK, lambda run: app.engine.make_batch(order, rows, out, run))
        app.runs.put(who(request, WORK), run)
        for go, interrupt, _, said, _, items in follow(app, run):
            yield go, interrupt, gr.update(value=said, visible=True), items

    return batch


def read_batch(app: App, lines: str, steps: float, guidance: float, seed: int) -> tuple[Request, list[list[Wanted]]]:
    """The pictures of a batch, all of one seed so that they can be compared, and the adapters of each."""
    texts = [line.strip() for line in lines.splitlines() if line.strip()]
    if not 1 <= len(texts) <= MAX_PICTURES:
        raise UserError(f"{len(texts)} lines: write 1 to {MAX_PICTURES} prompts, one a line")
    pictures, rows = [], []
    for text in texts:
        clean, tags = parse_tags(text)
        if uneven := next((tag.name for tag in tags if tag.unet != tag.te), None):
            raise UserError(f"{uneven!r} has two weights; in a batch each adapter has one: write <lora:{uneven}:0.8>")
        pictures.append((clean, seed))
        rows.append([wanted(app, tag, {}) for tag in tags])
    every = {adapter.name: adapter for row in rows for adapter in row}
    request = Request(tuple(pictures), Sampling(whole(steps, "steps"), float(guidance)), tuple(every.values()))
    request.check()
    return request, rows
