"""The Train tab: photos in, an adapter in the library out, by a process that outlives the page and the app."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr

from ...adapters.presets import PRESETS as ADAPTER_PRESETS
from ...demo import EXAMPLES, open_example
from ...errors import UserError
from ..jobs.images import MAX_PHOTOS, Checked, check_photos, with_captions
from ..jobs.training_form import MAX_YAML, PRESETS, build_settings, preflight
from ..layout.page import LAST, QUIET, Page, handler
from ..library import safe_name
from ..state import App
from . import train_view as view
from .generate_settings import recall_by, remember
from .train_runs import build_runs, choices, watch

TITLE = "Train"
METHODS = tuple(ADAPTER_PRESETS)
DROPPABLE = [".jpg", ".jpeg", ".png", ".webp", ".heic", ".heif", ".txt"]


def build(page: Page) -> None:
    """Photos, words and a preset on the left, the runs on the right."""
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            form = _form(page)
        with gr.Column(scale=6, min_width=320):
            runs = build_runs(page)
    _keep(page, form)
    started = _wire(page.app, form, runs.chosen)
    watch(page, runs, started)


def _form(page: Page) -> SimpleNamespace:
    photos = _photos(page)
    with gr.Row():
        word = gr.Textbox("", label="What it is", info="One word", placeholder="dog", max_length=40, min_width=140,
                          elem_id="train-class")  # fmt: skip
        trigger = gr.Textbox("sks", label="Trigger word", info="A rare one", max_length=40,
                             min_width=140, elem_id="train-trigger")  # fmt: skip
        name = gr.Textbox("my-subject", label="Name", info="In the library", max_length=64, min_width=140,
                          elem_id="train-name")  # fmt: skip
    settings = _settings()
    with gr.Row():
        check = gr.Button("Check", elem_id="train-check", scale=1, min_width=100)
        start = gr.Button("Train", variant="primary", elem_id="train-start", scale=2, min_width=100,
                          interactive=page.app.config.may_change)  # fmt: skip
    found = gr.HTML("", elem_id="train-findings")
    return SimpleNamespace(
        **photos, **settings, name=name, trigger=trigger, word=word, check=check, start=start, found=found
    )


def _photos(page: Page) -> dict[str, Any]:
    """Where photos come from, and what becomes of them."""
    pixels = ["pixels"] if page.app.engine.is_embedded else []
    dropped = gr.File(
        label="Drop 3 to 10 photos of one subject here", elem_id="train-photos", file_count="multiple",
        file_types=DROPPABLE, height=130,
    )  # fmt: skip
    slugs = sorted(f.parent.name for f in EXAMPLES.glob("*/subject.json")) if EXAMPLES.is_dir() else []
    with gr.Accordion("Or take an example subject", open=True, visible=bool(slugs)):
        examples = gr.Gallery(
            [(page.app.copy_for_good(EXAMPLES / slug / "0.png"), slug) for slug in slugs], label="Example subjects",
            show_label=False, columns=4, height=190, allow_preview=False, elem_id="train-examples", elem_classes=pixels,
            interactive=False, buttons=[],
        )  # fmt: skip
    report = gr.HTML("", elem_id="train-report")
    prepared = gr.Gallery(
        label="As they will be trained on", show_label=False, columns=5, height="auto", visible=False,
        elem_id="train-prepared", elem_classes=pixels, interactive=False, buttons=[], format="png",
    )  # fmt: skip
    return {
        "dropped": dropped, "examples": examples, "report": report, "prepared": prepared, "photos": gr.State([]),
        "faults": gr.State([]),
    }  # fmt: skip


def _settings() -> dict[str, Any]:
    """A preset, and what may differ from it."""
    preset = gr.Radio(
        list(PRESETS), value="Balanced", label="Preset", elem_id="train-preset",
        info="Fast for a first look, Best for a keeper",
    )  # fmt: skip
    with gr.Accordion("All settings", open=False):
        with gr.Row():
            method = gr.Dropdown(list(METHODS), value="nora", label="Method", min_width=120)
            steps = gr.Number(0, label="Steps", info="0: by the preset", precision=0, minimum=0, min_width=120)
            rate = gr.Number(0, label="Learning rate", info="0: by the preset", minimum=0, min_width=120)
        with gr.Row():
            encoder = gr.Checkbox(False, label="Train the text encoder too", min_width=200)
            prior = gr.Checkbox(False, label="Keep others of its kind as they are (prior preservation)", min_width=200)
        extra = gr.Textbox(
            "", label="Further settings, one 'key: value' a line", lines=3, max_length=4000, elem_id="train-extra",
            placeholder="rank: 32\nvalidation_prompt: a sks dog in the snow",
        )  # fmt: skip
    return {
        "preset": preset, "method": method, "steps": steps, "rate": rate, "encoder": encoder, "prior": prior,
        "extra": extra,
    }  # fmt: skip


def _keep(page: Page, form: SimpleNamespace) -> None:
    """Words and settings survive a reload, as those of the Generate tab do; photos are dropped anew."""
    rules: dict[str, list[Any]] = {
        "word": ["", 0, 40], "trigger": ["sks", 0, 40], "name": ["my-subject", 0, 64],
        "preset": ["Balanced", 0, 40, list(PRESETS)], "method": ["nora", 0, 40, list(METHODS)],
        "steps": [0, 0, 10**9], "rate": [0, 0, 10**3], "encoder": [False, 0, 1], "prior": [False, 0, 1],
        "extra": ["", 0, MAX_YAML],
    }  # fmt: skip
    parts = [getattr(form, name) for name in rules]
    gr.on([part.change for part in parts], None, parts, None, js=remember(rules, "Train"), **LAST, **QUIET)
    found = recall_by([[name, *rule] for name, rule in rules.items()], "Train")
    page.blocks.load(None, None, parts, js=found, **QUIET)


def _wire(app: App, form: SimpleNamespace, chosen: gr.Dropdown) -> Any:
    """Wire the form; returns the event of a started training."""
    shown = [form.photos, form.prepared, form.report, form.faults]
    values = [
        form.photos, form.preset, form.trigger, form.word, form.method, form.steps, form.rate, form.encoder, form.prior,
        form.extra,
    ]  # fmt: skip
    gr.on(  # not `change`: an example empties the field, too
        [form.dropped.upload, form.dropped.clear, form.dropped.delete],
        handler(lambda files: take_photos(app, files)), form.dropped, shown, api_name="train_photos",
        api_visibility="private", **LAST,
    )  # fmt: skip
    form.examples.select(
        handler(example_taker(app)), None, [*shown, form.name, form.trigger, form.word, form.dropped],
        api_name="train_example", api_visibility="private",
    )  # fmt: skip
    form.check.click(
        handler(checker(app)),
        [form.name, form.faults, *values],
        [form.found, form.prepared, form.report],
        api_name="train_check",
        api_visibility="private",
    )
    return form.start.click(
        handler(starter(app)), [form.name, *values], [form.found, chosen], api_name="train_start",
        api_visibility="private",
    )  # fmt: skip


def take_photos(app: App, files: Sequence[str] | None) -> tuple[list[str], Any, str, list[str]]:
    """Dropped files: which will do, shown as they will be trained on."""
    app.require_changes()
    paths = [Path(file) for file in files or []]
    captions = [path for path in paths if path.suffix.lower() == ".txt"]
    photos = [path for path in paths if path not in captions]
    faults: list[str] = []
    if captions and len(photos) <= MAX_PHOTOS:
        photos, faults = with_captions(photos, captions, app.private_folder())
    return show_photos(check_photos(photos, app.engine, {}), faults)


def show_photos(checked: Sequence[Checked], faults: Sequence[str] = ()) -> tuple[list[str], Any, str, list[str]]:
    """The paths, what the trainer makes of them, what is said of them, and the faults of captions for the next time."""
    pictures = [(picture, photo.caption or photo.remark) for photo in checked for picture in photo.pictures]
    return (
        [str(photo.path) for photo in checked],
        gr.update(value=pictures, visible=bool(pictures)),
        view.photo_report(checked, faults),
        list(faults),
    )


def example_taker(app: App) -> Any:
    """One click on an example subject fills photos and words."""

    def take(event: gr.SelectData) -> tuple[Any, ...]:
        app.require_changes()
        slug = str(event.value["caption"])
        example = open_example(slug)
        photos = show_photos(check_photos(sorted(example.folder.glob("*.png")), app.engine, {}))
        return *photos, slug, str(example.values["trigger"]), example.class_word, None

    return take


def checker(app: App) -> Any:
    """What the trainer says of the settings, and the photos as these would have them."""

    def check(name: str, faults: list[str], photos: list[str], *values: Any) -> tuple[Any, ...]:
        settings = form_settings(app, photos, *values)
        checked, warnings = look(app, photos, settings)
        return view.findings([*warnings, *renamed(name)]), *show_photos(checked, faults)[1:3]

    return check


def starter(app: App) -> Any:
    """Check, then start the process."""

    def start(name: str, photos: list[str], *values: Any) -> tuple[str, Any]:
        app.require_changes()
        settings = form_settings(app, photos, *values)
        checked, warnings = look(app, photos, settings)
        identity = app.jobs.start(safe_name(name), settings, [photo.path for photo in checked if photo.pictures])
        app.make_room()
        said = [*warnings, *renamed(name)]
        return view.findings(said) if said else "", gr.update(choices=choices(app), value=identity)

    return start


def renamed(name: str) -> list[str]:
    """What becomes of a name that is none for a folder and a tag; the Mix tab has the same rule."""
    safe = safe_name(name)
    return [] if safe == name.strip() else [f"It will be called '{safe}': a name has letters, digits, '_' and '-'."]


def look(app: App, photos: Sequence[str], settings: Mapping[str, Any]) -> tuple[list[Checked], list[str]]:
    """The photos under these settings, and the trainer's warnings about a run on those that will do."""
    checked = check_photos([Path(photo) for photo in photos or ()], app.engine, settings)
    usable = [photo.path for photo in checked if photo.pictures]
    return checked, preflight(app.engine, settings, usable, app.library.folder)


def form_settings(
    app: App, photos: Sequence[str], preset: str, trigger: str, word: str, method: str, steps: float | None,
    rate: float | None, encoder: bool, prior: bool, extra: str,
) -> dict[str, Any]:  # fmt: skip
    """The settings that the form means."""
    if method not in METHODS:
        raise UserError(f"there is no method {str(method)[:40]!r}: choose one of {', '.join(METHODS)}")
    has_captions = any(Path(photo).with_suffix(".txt").is_file() for photo in photos or ())
    changes = {
        "method": method, "max_train_steps": steps or None, "learning_rate": rate or None,
        "train_text_encoder": encoder or None, "with_prior_preservation": prior or None,
        "use_captions": has_captions or None,
    }  # fmt: skip
    return build_settings(app.engine, preset, trigger or "", word or "", changes, extra or "")
