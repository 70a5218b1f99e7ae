"""The Train tab: train an adapter on photos, in a process that survives a reload and a restart of the app."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import gradio as gr

from ...adapters.presets import PRESETS as ADAPTER_PRESETS
from ...data.caption_files import SUFFIXES
from ...data.captions import word_pattern
from ...demo import EXAMPLES, Example, open_example
from ...io.files import write_atomic
from ...training.settings.config import Optimizer, RankAllocation, Strategy, TrainConfig
from ..jobs.images import MAX_IMAGES, CheckedImage, check_images, with_captions
from ..jobs.training_form import LIMITS, MAX_YAML, PRESETS, build_settings, preflight
from ..layout.page import ALWAYS_LAST, UNQUEUED, Page, handler
from ..library import safe_name
from ..state import App
from . import train_view as view
from .generate_settings import restore_script, save_script
from .train_runs import build_runs, choices, watch

TITLE = "Train"
MAX_TRAIN_STEPS, MAX_RATE = int(LIMITS["max_train_steps"]), 1000
DEFAULTS = TrainConfig()
CHOICES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "method": ("Method", "Adapter type", tuple(ADAPTER_PRESETS)),
    "strategy": ("Strategy", "Around the steps", get_args(Strategy)),
    "rank_allocation": ("Ranks", "By layer", get_args(RankAllocation)),
    "optimizer": ("Optimizer", "Of the steps", get_args(Optimizer)),
}
"""Label, explanation and values of each setting that is chosen from a list."""
FILE_TYPES = [".jpg", ".jpeg", ".png", ".webp", ".heic", ".heif", *SUFFIXES]


def build(page: Page) -> None:
    """The form on the left, the runs on the right."""
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            form = _form(page)
        with gr.Column(scale=6, min_width=320):
            runs = build_runs(page)
    _persist(page, form)
    started = _wire(page.app, form, runs.chosen)
    watch(page, runs, started)


def _form(page: Page) -> SimpleNamespace:
    photos = _photos(page)
    with gr.Row():
        word = gr.Textbox("", label="Class word", info="What it is, in one word", placeholder="dog", max_length=40,
                          min_width=140, elem_id="train-class")  # fmt: skip
        trigger = gr.Textbox("", label="Trigger word", info="Empty: a rare word of its own", placeholder="automatic",
                             max_length=40, min_width=140, elem_id="train-trigger")  # fmt: skip
        name = gr.Textbox("my-subject", label="Name", info="In the library", max_length=64, min_width=140,
                          elem_id="train-name")  # fmt: skip
    settings = _settings()
    with gr.Row():
        check = gr.Button("Check", elem_id="train-check", scale=1, min_width=100)
        start = gr.Button("Train", variant="primary", elem_id="train-start", scale=2, min_width=100,
                          interactive=page.app.may_change)  # fmt: skip
    found = gr.HTML("", elem_id="train-findings")
    return SimpleNamespace(
        **photos, **settings, name=name, trigger=trigger, word=word, check=check, start=start, found=found
    )


def _photos(page: Page) -> dict[str, Any]:
    """Upload field, example subjects, and the cropped photos."""
    pixels = ["pixels"] if page.app.engine.is_embedded else []
    dropped = gr.File(
        label="3 to 10 photos of one subject", elem_id="train-photos", file_count="multiple",
        file_types=FILE_TYPES, height=130,
    )  # fmt: skip
    slugs = sorted(f.parent.name for f in EXAMPLES.glob("*/subject.json")) if EXAMPLES.is_dir() else []
    with gr.Accordion("Or use an example subject", open=True, visible=bool(slugs)):
        examples = gr.Gallery(
            [(page.app.copy_permanently(EXAMPLES / slug / "0.png"), slug) for slug in slugs], label="Example subjects",
            show_label=False, columns=4, height=190, allow_preview=False, elem_id="train-examples", elem_classes=pixels,
            interactive=False, buttons=[],
        )  # fmt: skip
    report = gr.HTML("", elem_id="train-report")
    prepared = gr.Gallery(
        label="Training crops", show_label=False, columns=5, height="auto", visible=False,
        elem_id="train-prepared", elem_classes=pixels, interactive=False, buttons=[], format="png",
    )  # fmt: skip
    return {
        "dropped": dropped, "examples": examples, "report": report, "prepared": prepared, "photos": gr.State([]),
        "errors": gr.State([]),
    }  # fmt: skip


def _settings() -> dict[str, Any]:
    """A preset, and settings that override it."""
    preset = gr.Radio(
        list(PRESETS), value="Balanced", label="Preset", elem_id="train-preset",
        info="Fast: a quick test; Best: the most training steps",
    )  # fmt: skip
    with gr.Accordion("Advanced settings", open=False):
        with gr.Row():
            chosen = {
                name: gr.Dropdown(list(values), value=getattr(DEFAULTS, name), label=label, info=info, min_width=180)
                for name, (label, info, values) in CHOICES.items()
            }
        with gr.Row():
            steps = gr.Number(0, label="Steps", info="0 = from the preset", precision=0, minimum=0,
                              maximum=MAX_TRAIN_STEPS, min_width=120)  # fmt: skip
            rate = gr.Number(0, label="Learning rate", info="0 = from the preset", minimum=0, maximum=MAX_RATE,
                             min_width=120)  # fmt: skip
        with gr.Row():
            encoder = gr.Checkbox(False, label="Train the text encoder too", min_width=200)
            prior = gr.Checkbox(False, label="Prior preservation", info="Keeps the class unchanged", min_width=200)
        extra = gr.Textbox(
            "", label="More settings, one 'key: value' per line", lines=3, max_length=4000, elem_id="train-extra",
            placeholder="rank: 32\nseed: 1",
        )  # fmt: skip
    return {
        "preset": preset, **chosen, "steps": steps, "rate": rate, "encoder": encoder, "prior": prior, "extra": extra,
    }  # fmt: skip


def _persist(page: Page, form: SimpleNamespace) -> None:
    """Store the form, except for the photos, in the browser over a reload."""
    rules: dict[str, list[Any]] = {
        "word": ["", 0, 40], "trigger": ["", 0, 40], "name": ["my-subject", 0, 64],
        "preset": ["Balanced", 0, 40, list(PRESETS)],
        **{name: [getattr(DEFAULTS, name), 0, 40, list(values)] for name, (_, _, values) in CHOICES.items()},
        "steps": [0, 0, MAX_TRAIN_STEPS], "rate": [0, 0, MAX_RATE], "encoder": [False, 0, 1], "prior": [False, 0, 1],
        "extra": ["", 0, MAX_YAML],
    }  # fmt: skip
    fields = [getattr(form, name) for name in rules]
    save = save_script(rules, "Train")
    gr.on([field.change for field in fields], None, fields, None, js=save, **ALWAYS_LAST, **UNQUEUED)
    restore = restore_script([[name, *rule] for name, rule in rules.items()], "Train")
    page.blocks.load(None, None, fields, js=restore, **UNQUEUED)


def _wire(app: App, form: SimpleNamespace, chosen: gr.Dropdown) -> Any:
    """Wire the form. Returns the event that starts a training."""
    # Progress and errors only on the report: Gradio would cover the photos and fields with them, an error for good.
    shown = {"api_visibility": "private", "show_progress_on": form.report}
    photos = [form.photos, form.prepared, form.report, form.errors]
    values = [
        form.photos, form.preset, form.trigger, form.word, *(getattr(form, name) for name in CHOICES), form.steps,
        form.rate, form.encoder, form.prior, form.extra,
    ]  # fmt: skip
    gr.on(  # not `change`: choosing an example clears the field
        [form.dropped.upload, form.dropped.clear, form.dropped.delete],
        handler(lambda files: read_upload(app, files)), form.dropped, photos, api_name="train_photos",
        **shown, **ALWAYS_LAST,
    )  # fmt: skip
    form.examples.select(
        handler(example_handler(app)), None, [*photos, form.name, form.trigger, form.word, form.dropped],
        api_name="train_example", **shown,
    )  # fmt: skip
    form.check.click(
        handler(check_handler(app)), [form.name, form.errors, *values], [form.found, form.prepared, form.report],
        api_name="train_check", **shown,
    )  # fmt: skip
    return form.start.click(
        handler(start_handler(app)), [form.name, *values], [form.found, chosen], api_name="train_start", **shown,
    )  # fmt: skip


def read_upload(app: App, files: Sequence[str] | None) -> tuple[list[str], Any, str, list[str]]:
    """Check the uploaded files and show them as the trainer crops them."""
    app.require_changes()
    paths = [Path(file) for file in files or []]
    captions = [path for path in paths if path.suffix.lower() in SUFFIXES]
    photos = [path for path in paths if path not in captions]
    errors: list[str] = []
    if captions and len(photos) <= MAX_IMAGES:
        photos, errors = with_captions(photos, captions, app.private_folder())
    return show_photos(check_images(photos, app.engine, {}), errors)


def show_photos(checked: Sequence[CheckedImage], errors: Sequence[str] = ()) -> tuple[list[str], Any, str, list[str]]:
    """Paths, gallery of crops, report, and the caption errors, which the next report repeats."""
    crops = [(crop, photo.caption or photo.remark) for photo in checked for crop in photo.crops]
    return (
        [str(photo.path) for photo in checked],
        gr.update(value=crops, visible=bool(crops)),
        view.photo_report(checked, errors),
        list(errors),
    )


def example_handler(app: App) -> Any:
    """Fill photos, name, trigger word and class word from an example subject.

    The trigger in its captions is replaced by one that no other adapter has.
    """

    def take(event: gr.SelectData) -> tuple[Any, ...]:
        app.require_changes()
        slug = str(event.value["caption"])
        example = open_example(slug)
        trigger = free_trigger(app)
        photos = copies_with_trigger(app, example, trigger)
        return *show_photos(check_images(photos, app.engine, {})), slug, trigger, example.class_word, None

    return take


def free_trigger(app: App) -> str:
    """A rare word that is the trigger of no adapter in the library and of no training."""
    from ...training.planning.preflight import rare_word

    taken = {word for entry in app.library.entries() if entry.info for word in re.split(r"[\s,]+", entry.info.trigger)}
    return rare_word(app.engine.pipe.tokenizer, taken | app.jobs.triggers())


def copies_with_trigger(app: App, example: Example, trigger: str) -> list[Path]:
    """The photos of an example, beside captions with this trigger."""
    photos = sorted(example.folder.glob("*.png"))
    captions = [file for photo in photos if (file := photo.with_suffix(".txt")).is_file()]
    copies, _ = with_captions(photos, captions, app.private_folder())
    own = re.compile(word_pattern(str(example.values["trigger"])))
    for file in (copy.with_suffix(".txt") for copy in copies):
        if file.is_file():
            write_atomic(file, own.sub(trigger, file.read_text(encoding="utf-8")))
    return copies


def check_handler(app: App) -> Any:
    """Show the trainer's preflight warnings, and the photos as cropped with these settings."""

    def check(name: str, errors: list[str], photos: list[str], *values: Any) -> tuple[Any, ...]:
        settings = form_settings(app, photos, *values)
        checked, warnings = run_checks(app, photos, settings)
        return view.findings([*warnings, *name_warnings(name)]), *show_photos(checked, errors)[1:3]

    return check


def start_handler(app: App) -> Any:
    """Run the checks, then start the training process."""

    def start(name: str, photos: list[str], *values: Any) -> tuple[str, Any]:
        app.require_changes()
        settings = form_settings(app, photos, *values)
        checked, warnings = run_checks(app, photos, settings)
        identity = app.jobs.start(safe_name(name), settings, [photo.path for photo in checked if photo.crops])
        app.make_room()
        warnings += name_warnings(name)
        return view.findings(warnings) if warnings else "", gr.update(choices=choices(app), value=identity)

    return start


def name_warnings(name: str) -> list[str]:
    """A warning if the name is changed because it is not valid for a folder and a tag, as in the Mix tab."""
    safe = safe_name(name)
    if safe == name.strip():
        return []
    return [f"The adapter will be named '{safe}': a name has only letters, digits, '_' and '-'."]


def run_checks(app: App, photos: Sequence[str], settings: Mapping[str, Any]) -> tuple[list[CheckedImage], list[str]]:
    """The photos as cropped with these settings, and the trainer's warnings about a run on the usable ones."""
    paths = [Path(photo) for photo in photos or ()]
    warnings = preflight(app.engine, settings, paths, app.library.folder)
    return check_images(paths, app.engine, settings), warnings


def form_settings(
    app: App, photos: Sequence[str], preset: str, trigger: str, word: str, method: str, strategy: str,
    rank_allocation: str, optimizer: str, steps: float | None, rate: float | None, encoder: bool, prior: bool,
    extra: str,
) -> dict[str, Any]:  # fmt: skip
    """Trainer settings from the values of the form."""
    chosen = dict(zip(CHOICES, (method, strategy, rank_allocation, optimizer), strict=True))
    has_captions = any(Path(photo).with_suffix(".txt").is_file() for photo in photos or ())
    changes = {
        **{name: value for name, value in chosen.items() if name == "method" or value != getattr(DEFAULTS, name)},
        "max_train_steps": steps or None, "learning_rate": rate or None,
        "train_text_encoder": encoder or None, "with_prior_preservation": prior or None,
        "use_captions": has_captions or None,
    }  # fmt: skip
    return build_settings(
        app.engine, preset, (trigger or "").strip() or free_trigger(app), word or "", changes, extra or ""
    )
