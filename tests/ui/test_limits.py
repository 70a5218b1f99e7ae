"""Every number of a page is bounded by the base and the machine, before any work; values of images as well."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from factories import write_photos
from PIL import Image, PngImagePlugin

from nora_diffusion import UserError
from nora_diffusion.generation.image_settings import ImageSettings, read_settings
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.training.settings.config import settings
from nora_diffusion.ui.config import AppConfig
from nora_diffusion.ui.jobs.images import PREVIEW_SIDE, check_images, distinct
from nora_diffusion.ui.jobs.training_form import OPEN_GROUPS, build_settings, preflight
from nora_diffusion.ui.request import LIMITS, MAX_SCALE, MAX_SEED, Request
from nora_diffusion.ui.runs import Run
from nora_diffusion.ui.state import App
from nora_diffusion.ui.tabs.generate import build_request
from nora_diffusion.ui.tabs.mix import mix_handler
from nora_diffusion.ui.tabs.restore import restored
from nora_diffusion.ui.tabs.train import run_checks

from .conftest import WAIT

HUGE = (2**31, 10**12, 2**62, 1e30, 1e300, float("inf"), float("nan"))
SETTINGS = ImageSettings(prompt="a fox", seed=3, steps=2, guidance=2.0, width=16, height=16)


@pytest.fixture(scope="module")
def app(base: Path, library: Path, tmp_path_factory: pytest.TempPathFactory) -> App:
    scratch = tmp_path_factory.mktemp("limits")
    return App(AppConfig(BaseSource(str(base), "cpu"), library=str(library)), scratch)


def open_numbers() -> list[str]:
    """The numbers of a training that a page may set."""
    types = ("int", "float", "int | None", "float | None")
    found = [setting for setting in settings() if setting.type in types and "closed" not in setting.metadata["tags"]]
    return [s.name for s in found if s.metadata["group"] in OPEN_GROUPS or "open" in s.metadata["tags"]]


@pytest.mark.parametrize("name", open_numbers())
def test_no_number_of_a_training_is_unbounded(app: App, name: str) -> None:
    for value in HUGE if name != "seed" else HUGE[2:]:
        with pytest.raises(UserError, match=name):
            build_settings(app.engine, "Fast", "sks", "dog", {}, f"{name}: {value}")


def test_the_resolution_fits_the_base(app: App) -> None:
    side = app.engine.side
    assert build_settings(app.engine, "Fast", "sks", "dog", {}, f"resolution: {2 * side}")["resolution"] == 2 * side
    with pytest.raises(UserError, match=f"resolution=100000 is too large: choose at most {MAX_SCALE * side}"):
        build_settings(app.engine, "Fast", "sks", "dog", {}, "resolution: 100000")


def test_photos_are_resized_after_the_preflight(app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = [str(path) for path in sorted(write_photos(tmp_path, 3).glob("*.png"))]
    form = build_settings(app.engine, "Fast", "sks", "dog", {"learning_rate": 1e-3})

    def resized(*_: Any) -> None:
        raise AssertionError("a photo was resized")

    monkeypatch.setattr("nora_diffusion.ui.jobs.images._cropped", resized)
    with pytest.raises(UserError, match="matches no projection"):
        run_checks(app, photos, {**form, "target_modules": ["nothing"]})


def test_crops_are_shown_small_and_files_are_read_once_each(app: App, tmp_path: Path) -> None:
    Image.effect_noise((900, 1500), 90).convert("RGB").save(tmp_path / "large.png")
    Image.effect_noise((300, 300), 90).convert("RGB").save(tmp_path / "small.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "small.png").read_bytes())
    (tmp_path / "broken.png").write_bytes((tmp_path / "small.png").read_bytes()[:200])
    paths = [tmp_path / name for name in ("broken.png", "large.png", "small.png", "copy.png")]
    checked = check_images(paths, app.engine, {"resolution": 1024})
    assert [crop.size for crop in checked[1].crops] == [(PREVIEW_SIDE, PREVIEW_SIDE)] * 4
    assert [bool(image.crops) for image in checked] == [False, True, True, False]
    assert "same photo as small.png" in checked[3].error
    assert distinct(paths) == paths[:3]
    form = build_settings(app.engine, "Fast", "zwxq", "dog", {})
    assert any("There are only 2 photos" in text for text in preflight(app.engine, form, paths, tmp_path))
    with pytest.raises(UserError, match="101 photos are too many"):
        distinct([paths[1]] * 101)


@pytest.mark.parametrize("name", ["count", "seed", "steps", "guidance", "width", "height", "hires", "hires_strength"])
def test_no_number_of_an_image_is_unbounded(app: App, name: str) -> None:
    form = {"count": 1, "seed": 1, "steps": 2, "guidance": 2.0, "width": 16, "height": 16, "block_weights": {},
            "hires": 2, "hires_strength": 0.5}  # fmt: skip
    assert build_request(app, "a fox", "", **form)
    for value in (*(HUGE if name != "seed" else HUGE[2:]), -2, LIMITS[name][1] + 8):
        with pytest.raises(UserError):
            build_request(app, "a fox", "", **{**form, name: value})


@pytest.mark.parametrize("rows", [1, 64])
def test_images_fit_the_base_and_the_memory(
    app: App, tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = app.engine.max_side
    with pytest.raises(UserError, match=f"choose a multiple of 8 up to {side}"):
        app.engine.check_size(Sampling(2, 2.0, width=side + 8), rows)
    app.engine.check_size(Sampling(2, 2.0, width=side, height=side), rows)
    monkeypatch.setattr("nora_diffusion.training.step.memory.available", lambda _: rows * 1000)
    with pytest.raises(UserError, match="GiB of memory"):
        app.engine.check_size(Sampling(2, 2.0), rows)
    large = Request((("a fox", 1),) * rows, Sampling(2, 2.0))
    monkeypatch.setattr(app.engine, "use", None)  # no work before the check
    make = app.engine.make if rows == 1 else lambda order, out, run: app.engine.make_batch(order, [[]] * rows, out, run)
    run = Run(app.device, "images", lambda run: make(large, tmp_path, run))
    run.join(WAIT)
    assert run.progress.state == "failed" and "GiB" in run.progress.message


def test_an_interrupt_ends_a_step(app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within one call of the denoiser, which can take minutes on a slow machine."""
    entered, asked, reached = threading.Event(), threading.Event(), []
    unet = app.engine.pipe.unet

    def pause(*_: Any) -> None:
        entered.set()
        asked.wait(WAIT)

    ends = unet.conv_out.register_forward_hook(lambda *_: reached.append(1))
    hooks = [unet.conv_in.register_forward_hook(pause), ends]
    order = Request((("a fox", 1),), Sampling(2, 2.0))
    try:
        run = Run(app.device, "images", lambda run: app.engine.make(order, tmp_path, run))
        assert entered.wait(WAIT)
        run.interrupt()
        asked.set()
        run.join(WAIT)
        assert (run.progress.state, reached) == ("stopped", [])
    finally:
        asked.set()
        for hook in hooks:
            hook.remove()
    assert not any(module._forward_pre_hooks for module in unet.modules())


@pytest.mark.parametrize(
    ("field", "value"),
    [(3, 10**9), (3, -1), (3, 1e300), (4, float("nan")), (4, 7.0), (5, 2**60), (5, -1)],
)
def test_numbers_of_a_mix_are_bounded(app: App, field: int, value: float) -> None:
    form: list[Any] = ["<lora:dog:1> <lora:hat:1>", "cat", "x", 0, 0.5, 0, 0]
    form[field] = value
    before = sorted(app.library.folder.iterdir())
    with pytest.raises(UserError):
        mix_handler(app)(*form)
    assert sorted(app.library.folder.iterdir()) == before


def with_text(path: Path, **texts: str) -> Path:
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


ODD = {
    "seed": (-5, 2**53, 2**64, 10**30), "steps": (0, -1, 201, 2**64, 10**26),
    "guidance": (1e999, float("nan"), -1.0, 31.0, 1e300), "width": (999999999, -8, 12, 10**30, 2056),
    "height": (10**30, 4, -16), "prompt": ("a" * 4001, "<lora:", "\ud800"),
    "negative_prompt": ("b" * 4001, "\udfff x"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_values_of_an_image_beyond_the_form_are_left_out_and_named(app: App, name: str, tmp_path: Path) -> None:
    label = {"negative_prompt": "Negative prompt", "guidance": "CFG scale"}.get(name, name.capitalize())
    key = "negative" if name == "negative_prompt" else name
    good, _, none = restored(app, SETTINGS)
    assert good["prompt"] == "a fox" and good["width"] == 16 and not none
    for value in ODD[name]:
        text = json.dumps({**asdict(SETTINGS), name: value})
        image = read_settings(with_text(tmp_path / "odd.png", nora_diffusion=text))
        values, _, notes = restored(app, image)
        assert key not in values and {**good, key: 0} == {**values, key: 0}
        assert any(note.startswith(f"{label} is left out: ") for note in notes), notes
        json.dumps([values, notes], allow_nan=False).encode()
        assert all(abs(number) <= MAX_SEED for number in values.values() if isinstance(number, int | float))


def test_odd_parameters_of_other_programs(app: App, tmp_path: Path) -> None:
    last = "Steps: 99999999999999999999999999, CFG scale: 1e999, Seed: -5, Size: 999999999x999999999"
    values, _, notes = restored(app, read_settings(with_text(tmp_path / "huge.png", parameters=f"dog\n{last}")))
    assert values == {"count": 1, "prompt": "dog", "negative": "", "sampler": "own", "hires": 1} and len(notes) == 5


@pytest.mark.parametrize(
    ("blocks", "words"),
    [({"mid": 1e300}, "out of range"), ({"mid": "x"}, "cannot be read"), ([1], "cannot be read"),
     ({"side": 1.0}, "is not a block"), ({"mid": None}, "cannot be read"), ({"mid": 10**400}, "cannot be read")],
)  # fmt: skip
def test_odd_block_weights_are_left_out_and_named(app: App, blocks: Any, words: str) -> None:
    entry = app.library.entry("dog")
    app.library.hash_all([entry])
    adapter = {"name": "dog", "weight": 0.5, "sha256": entry.sha256, "path": "", "blocks": blocks}
    values, weights, notes = restored(app, replace(SETTINGS, adapters=[adapter]))
    assert values["prompt"] == "a fox <lora:dog:0.5>" and weights == {} and words in notes[0]


def test_a_file_with_very_many_adapters(app: App) -> None:
    adapters = [{"name": "n" * 5000, "weight": 1.0, "sha256": "0" * 64, "path": ""}] * 5000
    started = time.monotonic()
    _, _, notes = restored(app, replace(SETTINGS, adapters=adapters, base="b" * 10**5))
    assert len(notes) < 40 and sum(map(len, notes)) < 10_000 and time.monotonic() - started < 30


DAMAGED = ('{"prompt": "x", "seed": 1e9999}', '{"adapters": [{"weight": 1' + "0" * 400 + "}]}", "[" * 10**5)


@pytest.mark.parametrize("text", DAMAGED, ids=("infinite", "too large", "nested"))
def test_damaged_settings_are_one_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="its settings are damaged"):
        read_settings(with_text(tmp_path / "odd.png", nora_diffusion=text))


def test_a_prompt_that_no_encoder_reads_to_its_end_is_refused(app: App, tmp_path: Path) -> None:
    pipe = app.engine.pipe
    room = pipe.tokenizer.model_max_length - pipe.tokenizer.num_special_tokens_to_add()
    words = "a " * room
    assert len(pipe.tokenizer(words, add_special_tokens=False).input_ids) == room

    def made(prompt: str, negative: str = "") -> Run:
        order = Request(((prompt, 1),), Sampling(1, 2.0, negative, 16, 16))
        run = Run(app.device, "images", lambda run: app.engine.make(order, tmp_path, run))
        run.join(WAIT)
        return run

    assert made(words).progress.state == "done"
    for prompts in ((words + "dog",), ("a", words + "dog")):
        run = made(*prompts)
        assert run.progress.state == "failed" and f"longer than the {room} tokens" in run.progress.message
        assert "dog" in run.progress.message and len(run.progress.files) == 0


def test_an_image_restores_whether_its_subjects_were_kept_apart(app: App) -> None:
    two = [{"name": name, "weight": 1.0, "sha256": "", "path": ""} for name in ("dog", "hat")]
    apart = [{**adapter, "words": adapter["name"]} for adapter in two]
    found = [restored(app, replace(SETTINGS, adapters=adapters))[0].get("apart") for adapters in (apart, two, two[:1])]
    assert found == [True, False, None]


def test_an_image_restores_its_sampler_and_its_second_pass(app: App) -> None:
    for sampler, expected in (("Euler a", "euler_a"), ("DPM++ 2M Karras", "dpmpp_2m_karras"), ("DDIMScheduler", "own")):
        values, _, notes = restored(app, replace(SETTINGS, sampler=sampler))
        assert values["sampler"] == expected and values["hires"] == 1 and not notes
    values, _, notes = restored(app, replace(SETTINGS, sampler="DPM adaptive"))
    assert values["sampler"] == "own" and "DPM adaptive is not offered" in notes[0]
    values, _, notes = restored(app, replace(SETTINGS, hires={"scale": 2.0, "strength": 0.4}))
    assert (values["hires"], values["hires_strength"]) == (2.0, 0.4) and not notes
    _, _, notes = restored(
        app, replace(SETTINGS, hires={"scale": 99.0, "strength": 9.0}, start={"image": "a.png", "strength": 1})
    )
    assert len(notes) == 3 and any("another one, a.png" in note for note in notes), notes


def test_a_second_pass_is_made_and_its_size_is_limited(app: App, tmp_path: Path) -> None:
    def made(scale: float) -> Run:
        order = Request((("a dog", 1),), Sampling(4, 2.0, "", 16, 16, hires_scale=scale, sampler="euler"))
        run = Run(app.device, "images", lambda run: app.engine.make(order, tmp_path, run))
        run.join(WAIT)
        return run

    run = made(2.0)
    assert run.progress.state == "done" and run.progress.steps == run.progress.step == 6
    with Image.open(run.progress.files[0]) as image:
        assert image.size == (32, 32)
    assert app.engine.side == 16 and "the largest side" not in made(4.0).progress.message
    app.engine.__dict__["side"] = 8
    assert "would make images of 64x64, and 32 is the largest side" in made(4.0).progress.message
    del app.engine.__dict__["side"]
