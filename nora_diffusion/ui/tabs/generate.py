"""The Generate tab: a prompt, a button, pictures."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import gradio as gr

from ...errors import UserError
from ...generation.sampling import MAX_PROMPT, Sampling
from ...generation.tags import Tag, parse_tags
from ..layout.page import QUIET, Page, handler, run_buttons, stopper, who
from ..request import MAX_PICTURES, Request, Wanted
from ..runs import Progress, Run
from ..state import App
from ..weights import AdapterWeights
from . import generate_settings, restore
from .generate_view import gallery_items, live, status
from .rack import build_rack

TITLE = "Generate"
WORK = "pictures"
MAX_SEED = 2**32 - 1


def build(page: Page) -> None:
    """Prompt and settings on the left, pictures on the right; on a phone the pictures come between the two."""
    app = page.app
    with gr.Row(elem_id="generate-areas"):
        with gr.Column(elem_id="generate-ask"):
            page.prompt.render()
            with gr.Row():
                go = gr.Button("Generate", variant="primary", elem_id="generate")
                interrupt = gr.Button("Interrupt", variant="stop", visible=False, elem_id="interrupt")
                skip = gr.Button("Skip this picture", visible=False, elem_id="skip")
        with gr.Column(elem_id="generate-more"):
            blocks = build_rack(page, page.prompt, "add-adapter")
            settings = generate_settings.build(page)
            restore.build(page, settings, blocks)
        with gr.Column(elem_id="generate-result"):
            said = gr.HTML(status(Progress(), idle=True), elem_id="status")
            preview = gr.HTML("", elem_id="preview", visible=False)
            gallery = gr.Gallery(
                label="Pictures", format="png", columns=2, object_fit="contain", elem_id="gallery", height="auto",
                elem_classes=["pixels"] if app.engine.is_embedded else [], buttons=["download", "fullscreen"],
            )  # fmt: skip
    buttons = [go, interrupt, skip]
    values = [page.prompt, settings.negative, settings.count, settings.seed, settings.steps, settings.guidance]
    run = go.click(
        handler(generator(app)), [*values, settings.width, settings.height, blocks],
        [*buttons, said, preview, gallery, settings.last_seed], api_name="generate", api_visibility="private",
        concurrency_limit=None, show_progress="hidden",
    )  # fmt: skip
    run_buttons(run, *buttons)
    interrupt.click(handler(stopper(app, Run.interrupt, WORK)), api_name="interrupt", **QUIET)
    skip.click(handler(stopper(app, Run.skip, WORK)), api_name="skip", **QUIET)


def generator(app: App) -> Any:
    """The handler of the button; a generator, so that a closed page ends the work."""

    def generate(
        prompt: str, negative: str, count: float, seed: float | None, steps: float, guidance: float, width: float,
        height: float, blocks: dict[str, dict[str, float]], request: gr.Request,
    ) -> Iterator[Any]:  # fmt: skip
        first = first_seed(seed)
        order = build_request(app, prompt, negative, whole(count), first, steps, guidance, width, height, blocks)
        out = app.library.pictures
        run = Run(app.device, WORK, lambda run: app.engine.make(order, out, run))
        app.runs.put(who(request, WORK), run)
        for updates in follow(app, run):
            yield *updates, first

    return generate


def follow(app: App, run: Run) -> Iterator[tuple[Any, ...]]:
    """Updates of (Generate, Interrupt, Skip, status, preview, gallery) as a run goes on."""
    shown: tuple[Any, ...] = ()
    for progress in run.follow():
        same = progress.files == shown
        items = gr.skip() if same else gr.update(value=gallery_items(app, progress.files), visible=True)
        shown = progress.files
        going = not progress.over
        buttons = [gr.update(visible=visible) for visible in (False, True, progress.state == "working")]
        yield *buttons, status(progress), gr.update(value=live(progress), visible=going), items


def build_request(
    app: App, prompt: str, negative: str, count: int, seed: int, steps: float, guidance: float, width: float | None,
    height: float | None, blocks: dict[str, dict[str, float]],
) -> Request:  # fmt: skip
    """What the page asks for, checked. Raises :class:`UserError` for what makes no sense."""
    if len(prompt or "") > MAX_PROMPT:
        raise UserError(f"the prompt has more than {MAX_PROMPT} characters: shorten it")
    if not 1 <= count <= MAX_PICTURES:
        raise UserError(f"{count} pictures at once: choose 1 to {MAX_PICTURES}")
    clean, tags = parse_tags(prompt or "")
    adapters = tuple(wanted(app, tag, (blocks or {}).get(tag.name, {})) for tag in tags)
    sampling = Sampling(
        whole(steps, "steps"), float(guidance), negative or "", whole(width, "width") or None,
        whole(height, "height") or None,
    )  # fmt: skip
    request = Request(tuple((clean, seed + i) for i in range(count)), sampling, adapters)
    request.check()
    return request


def wanted(app: App, tag: Tag, blocks: dict[str, float]) -> Wanted:
    """The adapter of the library that a tag names."""
    entry = app.library.entry(tag.name)
    misfit = app.misfit(entry)
    if misfit:
        raise UserError(f"the adapter {tag.name!r} cannot be used: {misfit}")
    return Wanted(tag.name, entry.file, AdapterWeights(tag.unet, tag.te, blocks))


def whole(value: float | None, name: str = "the number of pictures") -> int:
    """A whole number from what a page sent. Raises :class:`UserError` for NaN, infinity and fractions."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) > 2**63:
        raise UserError(f"{name} is no whole number that can be used: {str(value)[:40]}")
    if value != int(value):
        raise UserError(f"{name}={value} is no whole number")
    return int(value)


def first_seed(seed: float | None) -> int:
    """The seed itself, or a random one for an empty field or -1."""
    if seed is None or seed == -1:
        return random.randint(0, MAX_SEED)
    return whole(seed, "the seed")
