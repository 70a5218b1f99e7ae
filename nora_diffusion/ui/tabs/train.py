"""The Train tab: photos in, an adapter in the library out, by a process that outlives the page and the app."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import gradio as gr

from ...demo import EXAMPLES, open_example
from ...errors import UserError
from ...training.config import Method
from ..job import Job
from ..page import QUIET, Page, handler
from ..sample_scores import SampleScores, step_of
from ..state import App
from ..training_form import MAX_PHOTOS, PRESETS, build_settings, check_photos, preflight, with_captions
from . import train_view as view

TITLE = "Train"
TICK = 1.5
METHODS = get_args(Method)


def build(page: Page) -> None:
    """Photos, words and a preset on the left, the runs on the right."""
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            form = _form(page)
        with gr.Column(scale=6, min_width=320):
            runs = _runs(page)
    watch(page, form, runs)


def _form(page: Page) -> SimpleNamespace:
    slugs = sorted(f.parent.name for f in EXAMPLES.glob("*/subject.json")) if EXAMPLES.is_dir() else []
    pixels = ["pixels"] if page.app.engine.is_embedded else []
    with gr.Accordion("Example subjects", open=True, visible=bool(slugs)):
        examples = gr.Gallery(
            [(page.app.hand_out(EXAMPLES / slug / "0.png"), slug) for slug in slugs], label="Example subjects",
            show_label=False, columns=4, height=190, allow_preview=False, elem_id="train-examples", elem_classes=pixels,
            interactive=False, buttons=[],
        )  # fmt: skip
    dropped = gr.File(
        label="Photos of one subject (3 to 10), captions as .txt",
        elem_id="train-photos",
        file_count="multiple", file_types=[".jpg", ".jpeg", ".png", ".webp", ".txt"], height=160,
    )  # fmt: skip
    report = gr.HTML("", elem_id="train-report")
    prepared = gr.Gallery(
        label="As they will be trained on", show_label=False, columns=5, height="auto", visible=False,
        elem_id="train-prepared", elem_classes=pixels, interactive=False, buttons=[], format="png",
    )  # fmt: skip
    with gr.Row():
        name = gr.Textbox("my-subject", label="Name", max_length=64, min_width=120, elem_id="train-name")
        trigger = gr.Textbox("sks", label="Trigger word", max_length=40, min_width=100, elem_id="train-trigger")
        word = gr.Textbox(
            "", label="What it is", placeholder="dog", max_length=40, min_width=100, elem_id="train-class"
        )
    preset = gr.Radio(list(PRESETS), value="Balanced", label="Preset", elem_id="train-preset")
    with gr.Accordion("Everything", open=False):
        with gr.Row():
            method = gr.Dropdown(list(METHODS), value="nora", label="Method", min_width=120)
            steps = gr.Number(0, label="Steps (0: by the preset)", precision=0, min_width=120)
            rate = gr.Number(0, label="Learning rate (0: by the preset)", min_width=120)
        with gr.Row():
            encoder = gr.Checkbox(False, label="Train the text encoder too")
            prior = gr.Checkbox(False, label="Keep the class from drifting (prior preservation)")
        extra = gr.Textbox(
            "", label="Further settings, one 'key: value' a line", lines=3, max_length=4000, elem_id="train-extra",
            placeholder="rank: 32\nvalidation_prompt: a sks dog in the snow",
        )  # fmt: skip
    with gr.Row():
        check = gr.Button("Check", elem_id="train-check")
        start = gr.Button("Train", variant="primary", elem_id="train-start", interactive=page.app.config.may_change)
    found = gr.HTML("", elem_id="train-findings")
    return SimpleNamespace(
        examples=examples, dropped=dropped, report=report, prepared=prepared, name=name, trigger=trigger, word=word,
        preset=preset, method=method, steps=steps, rate=rate, encoder=encoder, prior=prior, extra=extra, check=check,
        start=start, found=found, photos=gr.State([]),
    )  # fmt: skip


def _runs(page: Page) -> SimpleNamespace:
    chosen = gr.Dropdown([], label="Trainings", elem_id="train-runs", interactive=True)
    status = gr.HTML(view.NO_RUN, elem_id="train-status")
    with gr.Row():
        stop = gr.Button("Stop and save", variant="stop", visible=False, elem_id="train-stop")
        resume = gr.Button("Resume", visible=False, elem_id="train-resume")
        remove = gr.Button("Remove this training", visible=False, elem_id="train-remove")
    curves = gr.HTML("", elem_id="train-curves")
    samples = gr.Gallery(
        label="Samples with fixed seeds", show_label=False, columns=4, height="auto", visible=False,
        elem_id="train-samples", elem_classes=["pixels"] if page.app.engine.is_embedded else [], format="png",
        interactive=False, buttons=["download", "fullscreen"],
    )  # fmt: skip
    return SimpleNamespace(
        chosen=chosen, status=status, stop=stop, resume=resume, remove=remove, curves=curves, samples=samples,
        timer=gr.Timer(TICK, active=False), shown=gr.State(()), finished=gr.State(None),
    )  # fmt: skip


def watch(page: Page, form: SimpleNamespace, runs: SimpleNamespace) -> None:
    """Wire the handlers."""
    app = page.app
    refresh = refresher(app, SampleScores())
    state = [runs.chosen, runs.shown, runs.finished, page.library_changed]
    seen = [
        runs.chosen, runs.status, runs.stop, runs.resume, runs.remove, runs.curves, runs.samples, runs.timer,
        runs.shown, runs.finished, page.library_changed,
    ]  # fmt: skip
    shown = [form.photos, form.prepared, form.report]
    values = [
        form.photos, form.preset, form.trigger, form.word, form.method, form.steps, form.rate, form.encoder, form.prior,
        form.extra,
    ]  # fmt: skip
    gr.on(  # not `change`: an example empties the field, too
        [form.dropped.upload, form.dropped.clear, form.dropped.delete],
        handler(lambda files: take_photos(app, files)), form.dropped, shown, api_name="train_photos",
        api_visibility="private",
    )  # fmt: skip
    form.examples.select(
        handler(example_taker(app)), None, [*shown, form.name, form.trigger, form.word, form.dropped],
        api_name="train_example", api_visibility="private",
    )  # fmt: skip
    form.check.click(handler(checker(app)), values, form.found, api_name="train_check", api_visibility="private")
    form.start.click(
        handler(starter(app)),
        [form.name, *values],
        [form.found, runs.chosen],
        api_name="train_start",
        api_visibility="private",
    ).success(handler(refresh), state, seen, **QUIET)
    acts = {"stop": app.jobs.stop, "resume": app.jobs.resume, "remove": app.jobs.remove}
    for name, act in acts.items():
        button = getattr(runs, name)
        button.click(handler(actor(app, act)), runs.chosen, None, api_name=f"train_{name}", **QUIET).success(
            handler(refresh), state, seen, **QUIET
        )
    gr.on(
        [page.blocks.load, page.tab.select, runs.timer.tick, runs.chosen.input], handler(refresh), state, seen, **QUIET
    )


def take_photos(app: App, files: Sequence[str] | None) -> tuple[list[str], Any, str]:
    """Dropped files: which will do, shown as they will be trained on."""
    app.require_changes()
    paths = [Path(file) for file in files or []]
    captions = [path for path in paths if path.suffix.lower() == ".txt"]
    photos = [path for path in paths if path not in captions]
    faults: list[str] = []
    if captions and len(photos) <= MAX_PHOTOS:
        photos, faults = with_captions(photos, captions, app.private_folder())
    return show_photos(app, photos, faults)


def show_photos(app: App, paths: Sequence[Path], faults: Sequence[str] = ()) -> tuple[list[str], Any, str]:
    """The paths that will be used, their pictures and what is said of them."""
    checked = check_photos(paths, app.engine.side)
    pictures = [(photo.picture, photo.caption or photo.remark) for photo in checked if photo.picture is not None]
    return (
        [str(photo.path) for photo in checked],
        gr.update(value=pictures, visible=bool(pictures)),
        view.photo_report(checked, faults),
    )


def example_taker(app: App) -> Any:
    """One click on an example subject fills photos and words."""

    def take(event: gr.SelectData) -> tuple[Any, ...]:
        app.require_changes()
        slug = str(event.value["caption"])
        example = open_example(slug)
        photos = show_photos(app, sorted(example.folder.glob("*.png")))
        trigger = str(example.values["trigger"])
        return *photos, slug, trigger, example.class_word, None

    return take


def checker(app: App) -> Any:
    """The checks before a run, as the trainer would make them."""

    def check(photos: list[str], *values: Any) -> str:
        settings = form_settings(app, photos, *values)
        return view.findings(preflight(app.engine, settings, _checked(app, photos), app.library.folder))

    return check


def starter(app: App) -> Any:
    """Check, then start the process."""

    def start(name: str, photos: list[str], *values: Any) -> tuple[str, Any]:
        app.require_changes()
        settings = form_settings(app, photos, *values)
        checked = _checked(app, photos)
        warnings = preflight(app.engine, settings, checked, app.library.folder)
        usable = [photo.path for photo in checked if photo.picture is not None]
        identity = app.jobs.start(name.strip(), settings, usable)
        return view.findings(warnings) if warnings else "", gr.update(choices=choices(app), value=identity)

    return start


def _checked(app: App, photos: Sequence[str]) -> list[Any]:
    return check_photos([Path(photo) for photo in photos], app.engine.side)


def form_settings(
    app: App, photos: Sequence[str], preset: str, trigger: str, word: str, method: str, steps: float | None,
    rate: float | None, encoder: bool, prior: bool, extra: str,
) -> dict[str, Any]:  # fmt: skip
    """The settings that the form means."""
    if method not in METHODS:
        raise UserError(f"there is no method {str(method)[:40]!r}: choose one of {', '.join(METHODS)}")
    has_captions = any(Path(photo).with_suffix(".txt").is_file() for photo in photos)
    changes = {
        "method": method, "max_train_steps": steps or None, "learning_rate": rate or None,
        "train_text_encoder": encoder or None, "with_prior_preservation": prior or None,
        "use_captions": has_captions or None,
    }  # fmt: skip
    return build_settings(app.engine, preset, trigger or "", word or "", changes, extra or "")


def actor(app: App, act: Any) -> Any:
    """Stop, resume or remove the chosen run."""

    def do(identity: str | None) -> None:
        app.require_changes()
        act(identity or "")

    return do


def choices(app: App) -> list[tuple[str, str]]:
    """The runs for the list, newest first."""
    return [(view.label(job), job.id) for job in app.jobs.list()]


def refresher(app: App, scores: SampleScores) -> Any:
    """What the right side shows now, read from disk: the same after a reload, in a new tab, after a restart."""

    def refresh(identity: str | None, shown: tuple[Any, ...], finished: Any, changed: int) -> tuple[Any, ...]:
        jobs = app.jobs.list()
        done = frozenset(job.id for job in jobs if job.status == "done")
        changed += bool(finished is not None and done - finished)
        job = _chosen(jobs, identity)
        if job is None:
            hidden = gr.update(visible=False)
            empty = gr.update(choices=[], value=None)
            return (empty, view.NO_RUN, hidden, hidden, hidden, "", hidden, gr.Timer(active=False), (), done, changed)
        listed, samples = [(view.label(j), j.id) for j in jobs], tuple(sample.name for sample in job.samples)
        now = (listed, job.id, samples)
        same_list = identity == job.id and shown[:1] == (listed,)  # an open list must not close under the cursor
        judged = scores.curves(job) if app.engine.is_embedded else None
        return (
            gr.skip() if same_list else gr.update(choices=listed, value=job.id),
            view.run_status(job),
            gr.update(visible=job.running, interactive=job.status != "stopping"),
            gr.update(visible=job.resumable, value=f"Resume from step {job.checkpoint}"),
            gr.update(visible=not job.running),
            view.curves(job, judged),
            gr.skip() if now[1:] == shown[1:] else _gallery(app, job),
            gr.Timer(active=any(j.running for j in jobs)),
            now,
            done,
            changed,
        )

    return refresh


def _chosen(jobs: Sequence[Job], identity: str | None) -> Job | None:
    """The run that was chosen, else the one that runs, else the newest."""
    wanted = [job for job in jobs if job.id == identity] or [job for job in jobs if job.running] or list(jobs)
    return wanted[0] if wanted else None


def _gallery(app: App, job: Job) -> Any:
    items = [(app.hand_out(sample), f"step {step_of(sample)}") for sample in job.samples]
    return gr.update(value=items, visible=bool(items))
