"""The Generate tab: prompt, adapters, settings, images."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from ...errors import UserError
from ...generation.settings import MAX_PROMPT, Sampling
from ...generation.start_image import StartImage
from ...generation.tags import Tag, parse_tags
from ..layout.page import UNQUEUED, Page, handler, run_buttons, run_key, stop_handler
from ..request import MAX_IMAGES, ActiveAdapter, Request
from ..runs import Progress, Run
from ..state import App
from ..weights import AdapterWeights
from . import generate_settings, restore, start_image, suggestions
from .adapter_sliders import build_sliders
from .generate_view import gallery_items, preview_image, status

TITLE = "Generate"
WORK = "images"
MAX_SEED = 2**32 - 1


def build(page: Page) -> None:
    """Prompt and settings on the left, images on the right; on a phone the images are between the two."""
    app = page.app
    with gr.Row(elem_id="generate-areas"):
        with gr.Column(elem_id="generate-ask"):
            page.prompt.render()
            suggestions.build(page)
            with gr.Row():
                go = gr.Button("Generate", variant="primary", elem_id="generate")
                interrupt = gr.Button("Interrupt", variant="stop", visible=False, elem_id="interrupt")
                skip = gr.Button("Skip this image", visible=False, elem_id="skip")
        with gr.Column(elem_id="generate-more"):
            block_weights = build_sliders(page, page.prompt, "add-adapter")
            start = start_image.build(page)
            settings = generate_settings.build(page)
            restore.build(page, settings, block_weights)
        with gr.Column(elem_id="generate-result"):
            status_line = gr.HTML(status(Progress(), idle=True), elem_id="status")
            preview = gr.HTML("", elem_id="preview", visible=False)
            gallery = gr.Gallery(
                label="Images", format="png", columns=2, object_fit="contain", elem_id="gallery", height="auto",
                elem_classes=["pixels"] if app.engine.is_embedded else [], buttons=["download", "fullscreen"],
                type="filepath",
            )  # fmt: skip
            start_image.send_to(page, gallery, start)
    buttons = [go, interrupt, skip]
    values = [
        page.prompt, settings.negative, settings.count, settings.seed, settings.steps, settings.guidance,
        settings.width, settings.height, block_weights, settings.apart, settings.sampler, settings.hires,
        settings.hires_strength, *start.inputs(),
    ]  # fmt: skip
    run = go.click(
        handler(generate_handler(app)), values,
        [*buttons, status_line, preview, gallery, settings.last_seed], api_name="generate", api_visibility="private",
        concurrency_limit=None, show_progress="hidden", js=start_image.fill_mask(values.index(start.mask)),
    )  # fmt: skip
    run_buttons(run, *buttons)
    interrupt.click(handler(stop_handler(app, Run.interrupt, WORK)), api_name="interrupt", **UNQUEUED)
    skip.click(handler(stop_handler(app, Run.skip, WORK)), api_name="skip", **UNQUEUED)


def generate_handler(app: App) -> Any:
    """The handler of the Generate button; a generator, so that closing the page stops the work."""

    def generate(
        prompt: str, negative: str, count: float, seed: float | None, steps: float, guidance: float, width: float,
        height: float, block_weights: dict[str, dict[str, float]], apart: bool, sampler: str, hires: float,
        hires_strength: float, start_file: str | None, mask: str, strength: float, closely: bool, request: gr.Request,
    ) -> Iterator[Any]:  # fmt: skip
        seed = first_seed(seed)
        order = build_request(
            app, prompt, negative, to_int(count), seed, steps, guidance, width, height, block_weights, apart, sampler,
            hires, hires_strength, start_image.start_of(app, start_file, mask, strength, closely),
        )  # fmt: skip
        out = app.library.images
        run = Run(app.device, WORK, lambda run: app.engine.make(order, out, run))
        app.runs.put(run_key(request, WORK), run)
        for updates in follow(app, run):
            yield *updates, seed

    return generate


def follow(app: App, run: Run, captions: Sequence[str] = ()) -> Iterator[tuple[Any, ...]]:
    """Updates of (Generate, Interrupt, Skip, status, preview, gallery) during a run."""
    shown: tuple[Any, ...] = ()
    for progress in run.follow():
        same = progress.files == shown
        items = gr.skip() if same else gr.update(value=gallery_items(app, progress.files, captions), visible=True)
        shown = progress.files
        can_skip = progress.state == "working" and not app.engine.is_remote  # a server makes all images together
        buttons = [gr.update(visible=visible) for visible in (False, True, can_skip)]
        preview = gr.update(value=preview_image(progress), visible=not progress.over)
        yield *buttons, status(progress), preview, items


def build_request(
    app: App, prompt: str, negative: str, count: int, seed: int, steps: float, guidance: float, width: float | None,
    height: float | None, block_weights: dict[str, dict[str, float]], apart: bool = True,
    sampler: str = generate_settings.OWN_SAMPLER, hires: float = 1.0, hires_strength: float = 0.5,
    start: StartImage | None = None,
) -> Request:  # fmt: skip
    """Build and check a request from the values of the page. Raises :class:`UserError` for invalid ones."""
    if len(prompt or "") > MAX_PROMPT:
        raise UserError(f"the prompt has more than {MAX_PROMPT} characters: shorten it")
    if not 1 <= count <= MAX_IMAGES:
        raise UserError(f"{count} images were requested at once: choose 1 to {MAX_IMAGES}")
    clean, tags = parse_tags(prompt or "")
    adapters = tuple(find_adapter(app, tag, (block_weights or {}).get(tag.name, {})) for tag in tags)
    sampling = Sampling(
        to_int(steps, "steps"), float(guidance), negative or "", to_int(width, "width") or None,
        to_int(height, "height") or None, sampler=None if sampler == generate_settings.OWN_SAMPLER else sampler,
        hires_scale=float(hires), hires_strength=float(hires_strength),
    )  # fmt: skip
    request = Request(tuple((clean, seed + i) for i in range(count)), sampling, adapters, bool(apart), start)
    request.check()
    return request


def find_adapter(app: App, tag: Tag, block_weights: dict[str, float]) -> ActiveAdapter:
    """The library's adapter for a tag. Raises :class:`UserError` if there is none or it cannot be used."""
    entry = app.library.entry(tag.name)
    problem = app.problem(entry)
    if problem:
        raise UserError(f"the adapter {tag.name!r} cannot be used with this base: {problem}")
    return ActiveAdapter(tag.name, entry.file, AdapterWeights(tag.unet, tag.te, block_weights))


def to_int(value: float | None, name: str = "the number of images") -> int:
    """Convert a number from the page; None is 0. Raises :class:`UserError` for NaN, infinity and fractions."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) > 2**63:
        raise UserError(f"{name} must be a whole number, not {str(value)[:40]}")
    if value != int(value):
        raise UserError(f"{name} must be a whole number, not {value}")
    return int(value)


def first_seed(seed: float | None) -> int:
    """The seed of the first image: random for an empty field or -1."""
    if seed is None or seed == -1:
        return random.randint(0, MAX_SEED)
    return to_int(seed, "the seed")
