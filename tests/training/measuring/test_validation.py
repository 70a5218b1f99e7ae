"""Measuring on the way: what is measured, that training does not notice, resuming, stopping early, the report."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from factories import tiny_clip, tiny_dino, write_photos
from PIL import Image
from runs import Configure, assert_equal_tensors
from safetensors.torch import load_file

from nora_diffusion import inspect_adapter, load_adapter, open_pipeline
from nora_diffusion.data import read_images
from nora_diffusion.data.transforms import Transform
from nora_diffusion.errors import UserError
from nora_diffusion.generation.sampling import sample_images
from nora_diffusion.generation.settings import Sampling
from nora_diffusion.scoring.judges import image_features, load_judge, load_vision, prompt_score, subject_score
from nora_diffusion.training import check, train
from nora_diffusion.training.measuring import validation
from nora_diffusion.training.measuring.heldout_loss import encode_photos, heldout_losses
from nora_diffusion.training.measuring.selection import Point, choose, dominates, front, reason, stalled, verdicts
from nora_diffusion.training.measuring.validation import Measure, Validation
from nora_diffusion.training.run.tracking import Trackers
from nora_diffusion.training.run.updates import Updates
from nora_diffusion.training.signals import Interrupted
from nora_diffusion.training.step.denoiser import encode_prompts
from nora_diffusion.training.step.objective import Objective
from nora_diffusion.training.step.seeds import derive


@pytest.fixture(scope="session")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``clip`` and ``dino``, tiny and random, and ``held-out``, two photos."""
    folder = tmp_path_factory.mktemp("judges")
    tiny_clip(folder / "clip")
    tiny_dino(folder / "dino")
    write_photos(folder / "held-out", 2, (20, 20), seed=9)
    return folder


@pytest.fixture
def measured(configure: Configure, judges: Path) -> Configure:
    """A run of four steps that measures after every second one."""

    def build(**changes: Any) -> Any:
        values: dict[str, Any] = {
            "judge": str(judges / "clip"), "dino": str(judges / "dino"), "validation_steps": 2, "max_train_steps": 4,
            "validation_prompts": ["{}", "a red {noun}"], "num_validation_images": 2, "learning_rate": 0.1,
            "validation_data_dir": str(judges / "held-out"), "sample_guidance": 2.0,
        }  # fmt: skip
        return configure(**values | changes)

    return build


def points_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "validation.json").read_text())["points"]


@pytest.mark.parametrize("with_dino", [True, False])
def test_the_scores_are_their_definitions(
    with_dino: bool, judges: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On pictures that are noise, another for each prompt, seed and state of the adapter."""
    off: list[bool] = []

    def picture(prompt: str, seed: int, live: bool) -> Image.Image:
        pixels = np.random.default_rng(derive(seed, prompt, live)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        return Image.fromarray(pixels).resize((64, 64))

    @contextmanager
    def without(pipe: Any) -> Iterator[None]:
        off.append(True)
        yield
        off.clear()

    monkeypatch.setattr(validation, "without_adapters", without)
    monkeypatch.setattr(
        validation, "generate_images", lambda _, prompt, seeds, *__: [picture(prompt, s, not off) for s in seeds]
    )
    monkeypatch.setattr(Validation, "_save_images", lambda *_: None)
    clip, dino = load_judge(judges / "clip"), load_vision(judges / "dino") if with_dino else None
    both = {"clip_i": clip, **({"dino": dino} if dino else {})}
    real = [picture("real", number, True) for number in range(2)]
    measure = Measure(both, real, ["a sks dog", "sks"], ["a dog", "dog"], [5, 6, 7], {})
    scores = Validation(measure, SimpleNamespace(folder=tmp_path), Any, torch.float32)._scores(3)
    groups = [[picture(prompt, seed, True) for seed in (5, 6, 7)] for prompt in ("a sks dog", "sks")]
    looked = [image_features(dino or clip, group) for group in groups]
    now, base = (
        image_features(dino or clip, [picture(prompt, seed, live) for prompt in ("a dog", "dog") for seed in (5, 6)])
        for live in (True, False)
    )
    expected = {
        "clip_i": subject_score(clip, [*chain(*groups)], real),
        **({"dino": subject_score(dino, [*chain(*groups)], real)} if dino else {}),
        "clip_t": prompt_score(clip, [*chain(*groups)], ["a dog"] * 3 + ["dog"] * 3),
        "drift": 1 - float((now * base).sum(1).mean()),
        "diversity": sum(float(1 - f[i] @ f[j]) for f in looked for i, j in ((0, 1), (0, 2), (1, 2))) / 6,
    }  # fmt: skip
    assert scores == pytest.approx(expected, abs=2e-6) and list(scores) == list(expected)
    assert scores["drift"] > 1e-3


def test_likeness_is_to_the_subject_that_was_asked_for() -> None:
    """With two subjects: 2 seeds of prompts 0 and 1 against photos 0 and 1, 2 of prompt 2 against photo 2."""
    source = torch.Generator().manual_seed(0)
    seen, real = (F.normalize(torch.randn(n, 4, generator=source), dim=1) for n in (6, 3))
    measure = Measure({}, [Any] * 3, ["a", "b", "c"], [], [5, 6], {}, (), [0, 0, 1], [0, 0, 1])
    found = Validation(measure, SimpleNamespace(folder=Path()), Any, torch.float32)
    found._real["clip_i"] = real
    cosines = seen @ real.T
    expected = (cosines[:4, :2].mean(1).sum() + cosines[4:, 2].sum()) / 6
    assert found._likeness("clip_i", seen) == pytest.approx(float(expected), abs=1e-6)


def test_a_damaged_record_is_said_and_a_missing_one_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    measure = Measure({}, [], [], [], [], {})
    found = Validation(measure, SimpleNamespace(folder=tmp_path), Any, torch.float32)
    found.restore(4)
    assert not caplog.text
    (tmp_path / "validation.json").write_text('{"settings": {}, "points": [')
    found.restore(4)
    assert f"{tmp_path / 'validation.json'} is damaged" in caplog.text and found.points == []


def test_a_run_measures_its_own_pictures(measured: Configure, judges: Path, tiny_base: Path) -> None:
    """Likeness and prompts as of pictures that another pipeline makes with the adapter kept of a step."""
    strong = {"method": "lora", "inner_rank": None, "basis": None, "target_modules": ["attn", "ff", "proj", "conv"]}
    folder = train(measured(**strong, learning_rate=1.0)).adapter_path.parent
    found = {point["step"]: point["scores"] for point in points_of(folder)}
    assert list(found) == [0, 2, 4] and found[0]["drift"] == pytest.approx(0, abs=1e-6)
    step = next(step for step in (2, 4) if (folder / f"candidates/step-{step}").is_dir())
    pipe: Any = open_pipeline(tiny_base)
    load_adapter(pipe, folder / f"candidates/step-{step}", "one")
    seeds = [derive(7, "validation", number) % 2**31 for number in range(2)]
    prompts = ("a sks dog", "a red sks dog")
    sampling = Sampling(1, 2.0, width=16, height=16)
    images = [image for p in prompts for image in sample_images(pipe, [p] * 2, seeds, sampling)]
    real = [Image.open(judges / f"held-out/{i}.png").convert("RGB") for i in range(2)]
    clip = load_judge(judges / "clip")
    # The strong adapter makes rounding visible: a few pixels may differ by one level.
    assert found[step]["clip_i"] == pytest.approx(subject_score(clip, images, real), abs=5e-5)
    assert "heldout_loss" in found[step]
    assert found[step]["clip_t"] == pytest.approx(
        prompt_score(clip, images, ["a dog"] * 2 + ["a red dog"] * 2), abs=5e-5
    )
    assert abs(found[step]["clip_i"] - found[0]["clip_i"]) > 1e-4


def test_training_does_not_notice(measured: Configure, configure: Configure, tmp_path: Path) -> None:
    """Same losses and, at the last step, the same adapter as of a run that measures nothing."""
    watched = train(measured(dropout=0.3)).adapter_path.parent
    plain = train(configure(max_train_steps=4, learning_rate=0.1, dropout=0.3, output_dir=str(tmp_path / "plain")))
    rows = [
        [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (watched, plain.adapter_path.parent)
    ]
    assert rows[0] == rows[1]
    last, other = (load_file(p / "checkpoints/step-4/nora_adapter.safetensors") for p in (watched, tmp_path / "plain"))
    assert all(torch.equal(last[key], other[key]) for key in last)


def test_measuring_leaves_the_random_state_alone(measured: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[bool] = []
    original = Validation.measure_step

    def measure_step(self: Validation, step: int, *rest: Any) -> Any:
        before = torch.random.get_rng_state()
        found = original(self, step, *rest)
        states.append(torch.equal(before, torch.random.get_rng_state()))
        return found

    monkeypatch.setattr(Validation, "measure_step", measure_step)
    train(measured())
    assert states == [True] * 3


@pytest.mark.parametrize("step", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_chooses_the_same(
    step: int, measured: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(measured(output_dir=str(tmp_path / "whole"))).adapter_path
    original = Updates._update

    def update(self: Updates, done: int) -> float:
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, done)

    with monkeypatch.context() as patch:
        patch.setattr(Updates, "_update", update)
        with pytest.raises(Interrupted):
            train(measured(output_dir=str(tmp_path / "parts")))
    parts = train(measured(output_dir=str(tmp_path / "parts"), resume_from_checkpoint="latest")).adapter_path
    assert points_of(whole.parent) == points_of(parts.parent)
    assert inspect_adapter(whole).step == inspect_adapter(parts).step
    one, other = load_file(whole), load_file(parts)
    assert all(torch.equal(one[key], other[key]) for key in one)


DAMAGED: dict[str, Any] = {
    "not JSON": b"{", "no text": b"\xff", "a list": b"[]", "too deep": b"[" * 100_000, "no points": b"{}",
    "a point that is none": [7], "no step": [{"scores": {"clip_i": 0.1}}], "a step of text": [{"step": "0"}],
    "scores of text": [{"step": 0, "scores": {"clip_i": "0.1"}}], "no clip_i": [{"step": 0, "scores": {"drift": 0.1}}],
    "an unknown score": [{"step": 0, "scores": {"clip_i": 0.1, "luck": 1.0}}],
    "not finite": b'{"points": [{"step": 0, "scores": {"clip_i": NaN}}]}',
    "beyond all bounds": [{"step": 0, "scores": {"clip_i": 1e300}}],
    "a score of true": [{"step": 0, "scores": {"clip_i": True}}],
}  # fmt: skip


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for a finished run that several tests copy."""
    return tmp_path_factory.mktemp("kept")


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_scores_do_not_stop_a_resumed_run(
    damage: Any, measured: Configure, kept: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, {0: 0.1, 2: 0.9, 4: 0.5, 6: 0.95})
    if not (kept / "run").exists():
        train(measured(output_dir=str(kept / "run")))
    folder = shutil.copytree(kept / "run", measured().folder)
    path = folder / "validation.json"
    document = json.loads(path.read_text())
    path.write_bytes(damage if isinstance(damage, bytes) else json.dumps({**document, "points": damage}).encode())
    result = train(measured(max_train_steps=6, resume_from_checkpoint="latest"))
    assert result.steps == 6 and "is damaged" in caplog.text
    assert [point["step"] for point in points_of(folder)] == [4, 6]


def scripted(monkeypatch: pytest.MonkeyPatch, likeness: dict[int, float]) -> None:
    """Measurements of which only likeness moves."""
    scores = {"clip_t": 0.3, "drift": 0.0}
    monkeypatch.setattr(Validation, "_scores", lambda self, step: {"clip_i": likeness[step], **scores})


def test_the_chosen_step_is_the_adapter_of_the_run(measured: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, {0: 0.1, 1: 0.5, 2: 0.9, 3: 0.6, 4: 0.8})
    result = train(measured(validation_steps=1, checkpointing_steps=1))
    folder = result.adapter_path.parent
    assert inspect_adapter(folder).step == 2 and result.steps == 4
    chosen, last = (load_file(folder / f"checkpoints/step-{s}/nora_adapter.safetensors") for s in (2, 4))
    kept = load_file(result.adapter_path)
    assert all(torch.equal(kept[key], chosen[key]) for key in kept) and any(
        not torch.equal(kept[key], last[key]) for key in kept
    )
    assert sorted(p.name for p in (folder / "candidates").iterdir()) == ["step-2", "step-4"]  # the front and the last
    assert "Step 2 is kept: of the steps with at least 80% of" in (folder / "README.md").read_text()
    again = train(measured(validation_steps=1, checkpointing_steps=1, resume_from_checkpoint="latest"))
    assert inspect_adapter(again.adapter_path).step == 2


def test_stopping_early(measured: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, {0: 0.1, 1: 0.5, 2: 0.9, 3: 0.6, 4: 0.8, 5: 1.0})
    early = {"validation_steps": 1, "max_train_steps": 20, "early_stopping": 2, "lr_scheduler": "cosine"}
    result = train(measured(**early))
    folder = result.adapter_path.parent
    assert (result.steps, inspect_adapter(folder).step) == (4, 2)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-4"]
    assert "stopped early" in (folder / "report.html").read_text()
    again = train(measured(**early, resume_from_checkpoint="latest"))
    assert (again.steps, inspect_adapter(folder).step) == (4, 2)  # and not further
    assert len((folder / "log.jsonl").read_text().splitlines()) == 4


def lose_the_best(measured: Configure, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a finished run whose best step, 2, has lost its candidate."""
    scripted(monkeypatch, {0: 0.1, 2: 0.9, 4: 0.5})
    folder = train(measured()).adapter_path.parent
    shutil.rmtree(folder / "candidates/step-2")
    return folder


def test_a_lost_candidate_leaves_the_last_step(
    measured: Configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = lose_the_best(measured, monkeypatch)
    train(measured(resume_from_checkpoint="latest"))
    assert inspect_adapter(folder).step == 4 and "the last step is kept" in caplog.text
    page = (folder / "report.html").read_text()
    assert "Step 2 would be kept" in page and "could not be read, so step 4 is kept" in page
    assert "The adapter in this folder is that of step 4" in page and "kept, last" in page


def test_a_renamed_candidate_is_not_taken_for_the_chosen_one(
    measured: Configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = lose_the_best(measured, monkeypatch)
    (folder / "candidates/step-4").rename(folder / "candidates/step-2")
    train(measured(resume_from_checkpoint="latest"))
    assert "step-2 holds the adapter of step 4" in caplog.text and inspect_adapter(folder).step == 4


def test_a_last_step_that_was_not_measured_is_not_taken_for_the_chosen_one(
    measured: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers in the file are those of the step that it names."""
    scripted(monkeypatch, {0: 0.1, 2: 0.9})  # at step 4 it fails, whatever kind of error that is
    folder = train(measured(checkpointing_steps=2)).adapter_path.parent
    assert inspect_adapter(folder).step == 2
    assert_equal_tensors(folder / "nora_adapter.safetensors", folder / "checkpoints/step-2/nora_adapter.safetensors")
    assert "The last step, 4, was not measured." in (folder / "report.html").read_text()


def test_the_card_shows_the_step_in_the_file(measured: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Validation._scores

    def scores(self: Validation, step: int) -> dict[str, float]:
        return {**original(self, step), "dino": {0: 0.1, 2: 0.9, 4: 0.5}[step]}

    monkeypatch.setattr(Validation, "_scores", scores)
    card = (train(measured(validation_prompt="a sks dog in snow")).adapter_path.parent / "README.md").read_text()
    shown = ("samples/step-000002-0.png", "samples/step-000002-1.png", "validation/step-000002-0.png")
    assert all(f"({name})" in card for name in shown) and "step-000004" not in card
    assert all(f"`{prompt}`:" in card for prompt in ("a sks dog in snow", "a sks dog", "a red sks dog"))


def test_a_failing_measurement_is_a_warning(
    measured: Configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no picture today")

    monkeypatch.setattr("nora_diffusion.training.measuring.validation.generate_images", broken)
    monkeypatch.setattr("nora_diffusion.training.run.report.line_chart", broken)
    result = train(measured())
    assert result.steps == 4 and inspect_adapter(result.adapter_path).step == 4
    assert "validation failed at step 2" in caplog.text and "report.html could not be written" in caplog.text


def test_held_out_photos_are_not_learned_from(measured: Configure, tmp_path: Path) -> None:
    place = write_photos(tmp_path / "five", 5, (20, 20))
    config = measured(instance_data_dir=str(place), validation_data_dir=None, validation_split=2)
    folder = train(config).adapter_path.parent
    settings = json.loads((folder / "validation.json").read_text())["settings"]
    assert settings["real"] == "held-out photos" and len(settings["photos"]) == 2
    assert "3 photos" in (folder / "report.html").read_text()
    names = json.loads((folder / "data_report.json").read_text())["held_out"]
    assert len(names) == 2 and f"not trained on: {', '.join(names)}." in (folder / "data_report.html").read_text()
    with pytest.raises(UserError, match="leaves none of 5 photos"):
        train(measured(instance_data_dir=str(place), validation_data_dir=None, validation_split=5,
                       output_dir=str(tmp_path / "none")))  # fmt: skip


def test_held_out_photos_that_are_learned_from_are_named(measured: Configure, photos: Path, tmp_path: Path) -> None:
    place = write_photos(tmp_path / "held", 1, (24, 20), seed=5)
    with Image.open(photos / "1.png") as photo:
        photo.save(place / "copy.webp", lossless=True)
    config = measured(validation_data_dir=str(place))
    findings = "\n".join(finding.text for finding in check(config))
    assert "1 of the 2 held-out photos are also training photos, such as 'copy.webp'" in findings
    assert "(1 of them also used for training)" in (train(config).adapter_path.parent / "report.html").read_text()
    assert "also training photos" not in "\n".join(
        finding.text for finding in check(measured(overwrite_output_dir=True))
    )


def test_held_out_photos_alone_need_no_judge_and_no_images(
    measured: Configure, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step with the lowest loss on them is kept, and the record has its loss as another pipeline measures it."""
    monkeypatch.setattr(validation, "generate_images", None)
    monkeypatch.setattr(validation, "load_judges", None)
    place = write_photos(tmp_path / "three", 3, (16, 16))
    (place / "0.txt").write_text("a red sks dog")
    off = {"judge": None, "dino": None, "validation_prompts": None, "validation_data_dir": None}
    result = train(
        measured(**off, instance_data_dir=str(place), use_captions=True, validation_split=2, early_stopping=9)
    )
    folder = result.adapter_path.parent
    losses = {point["step"]: point["scores"].pop("heldout_loss") for point in points_of(folder)}
    assert list(losses) == [0, 2, 4] and not any(
        point["scores"].keys() - {"heldout_loss"} for point in points_of(folder)
    )
    kept = min((2, 4), key=lambda step: losses[step])
    assert inspect_adapter(result.adapter_path).step == kept
    pipe: Any = open_pipeline(tiny_base)
    load_adapter(pipe, result.adapter_path, "one")
    photos = sorted(read_images(place), key=lambda photo: photo.sha256)[:2]
    captions = ["a red sks dog" if photo.path.name == "0.png" else "a photo of sks dog" for photo in photos]
    encoded = encode_photos(pipe, photos, Transform([(16, 16)]))
    found = heldout_losses(pipe, Objective.of(pipe.scheduler), encoded, encode_prompts(pipe, captions), torch.float32)
    assert losses[kept] == pytest.approx(float(found.mean()), abs=2e-5)
    page = (folder / "report.html").read_text()
    assert f"Step {kept} is kept: it has the lowest held-out loss" in page and "held-out loss ↓" in page
    assert "gain ↑" not in page


def test_mistakes(measured: Configure, tmp_path: Path) -> None:
    for changes, words in (
        ({"judge": None}, "measuring needs --judge"),
        (
            {"judge": None, "dino": None, "validation_prompts": None, "validation_data_dir": None, "early_stopping": 3},
            "validation needs held-out photos, --validation_split 2",
        ),
        ({"judge": str(tmp_path)}, "cannot load the judge"),
        ({"dino": str(tmp_path)}, "cannot load the vision model"),
        ({"instance_prompt": "sks"}, "set --class_word"),
        ({"validation_split": 1}, "exclude each other"),
        ({"early_stopping": 0}, "must be above 0"),
        ({"validation_prompts": ["{}", "a dog in snow"]}, "the subject is missing in 'a dog in snow'"),
        ({"validation_data_dir": str(tmp_path / "nowhere")}, "does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            train(measured(**changes))
        assert not measured().folder.exists()


def test_the_report(measured: Configure) -> None:
    folder = train(measured(validation_prompt="a sks dog in snow")).adapter_path.parent
    page = (folder / "report.html").read_text()
    for said in ("Which step", "the base alone", "Pareto front", "a red sks dog", "a sks dog in snow", "held-out"):
        assert said in page
    assert page.count("data:image/png;base64,") == 3 * 2 + 3 * 2  # two prompts measured, two samples, three times
    assert page.count("<svg") == 7 and "<script" not in page and "http" not in page.split("Settings</h2>")[0]


def test_a_run_without_measuring_has_a_report_too(configure: Configure) -> None:
    page = (train(configure()).adapter_path.parent / "report.html").read_text()
    assert page.count("<svg") == 1 and "Which step" not in page


# The rule


def points(*rows: tuple[int, float, float, float]) -> list[Point]:
    return [Point(step, {"clip_i": a, "clip_t": b, "drift": c}) for step, a, b, c in rows]


RUN = points((0, 0.5, 0.3, 0.0), (10, 0.6, 0.3, 0.05), (20, 0.8, 0.29, 0.1), (30, 0.82, 0.2, 0.4))


def test_the_rule_against_its_formula() -> None:
    """Step 10 costs least and has too little likeness; step 30 has most of it and costs most."""
    found = verdicts(RUN)
    assert [found[step].gain for step in (0, 10, 20, 30)] == pytest.approx([0, 0.1 / 0.32, 0.3 / 0.32, 1])
    expected = (((0.3 - 0.29) / 0.1) ** 2 / 2 + (0.1 / 0.4) ** 2 / 2) ** 0.5
    assert found[20].cost == pytest.approx(expected) and (found[0].cost, found[30].cost) == (0, 1)
    assert choose(RUN) == 20
    said = reason(RUN, 20, 30)
    assert "Step 20 is kept" in said and "(CLIP-I, here 94%) it has the lowest cost in CLIP-T and drift (0.19)" in said
    assert "The last step, 30, has 100% of the gain, at a cost of 1.00." in said


def test_a_half_learned_subject_is_not_kept_for_its_diversity() -> None:
    """As measured on the embedded base: at step 50 it is no more than a cat, and its pictures differ most."""
    scores = {0: (0.13, 0.376, 0.0, 0.044), 50: (0.455, 0.312, 0.321, 0.273), 100: (0.576, 0.306, 0.46, 0.111),
              150: (0.651, 0.291, 0.498, 0.104), 200: (0.666, 0.295, 0.505, 0.112)}  # fmt: skip
    rows = [Point(s, dict(zip(("clip_i", "clip_t", "drift", "diversity"), v, strict=True))) for s, v in scores.items()]
    assert choose(rows) == 100 and verdicts(rows)[50].losses["diversity"] == 0


def test_noise_does_not_choose() -> None:
    """A score that hardly moves is not blown up to its range."""
    still = points((0, 0.5, 0.3, 0.0), (10, 0.7, 0.3, 0.0), (20, 0.8, 0.2999, 0.0))
    assert choose(still) == 20 and verdicts(still)[20].cost < 0.01


def test_a_run_in_which_nothing_is_gained_keeps_the_best_there_is() -> None:
    assert choose(points((0, 0.5, 0.3, 0.0), (10, 0.4, 0.3, 0.1), (20, 0.45, 0.3, 0.2))) == 20


def test_without_judges_the_lowest_heldout_loss_is_kept() -> None:
    losses = {0: 0.12, 10: 0.07, 20: 0.06, 30: 0.06, 40: 0.08}
    rows = [Point(step, {"heldout_loss": loss}) for step, loss in losses.items()]
    assert choose(rows) == 20 and front(rows) == [20] and verdicts(rows) == {}
    assert choose(rows[:1]) is None and front(rows[:1]) == []
    assert stalled(rows, 2) and not stalled(rows, 3)
    assert reason(rows, 20, 40) == (
        "Step 20 is kept: it has the lowest held-out loss (0.0600, 0.1200 without the adapter). That of the last step, "
        "40, is 0.0800."
    )
    assert "Step 20 would be kept" in reason(rows, 40, 40) and "step 40 is kept" in reason(rows, 40, 40)


def test_the_front_has_what_nothing_beats() -> None:
    worse = points((40, 0.7, 0.2, 0.5))
    found = verdicts(RUN + worse)
    assert front(RUN + worse) == [10, 20, 30] and dominates(found[20], found[40])
    twins = points((0, 0.5, 0.3, 0.0), (10, 0.6, 0.3, 0.1), (20, 0.6, 0.3, 0.1))
    assert front(twins) == [10, 20] and choose(twins) == 10


def test_the_chosen_step_is_on_the_front() -> None:
    source = torch.Generator().manual_seed(0)
    for _ in range(50):
        rows = [Point(10 * i, dict(zip(("dino", "clip_i", "clip_t", "drift", "diversity"),
                torch.rand(5, generator=source).tolist(), strict=True))) for i in range(8)]  # fmt: skip
        assert choose(rows) in front(rows)


def test_patience() -> None:
    rising = points((0, 0.1, 0.3, 0.0), (10, 0.9, 0.3, 0.0), (20, 0.8, 0.3, 0.0), (30, 0.7, 0.3, 0.0))
    assert stalled(rising, 2) and not stalled(rising, 3) and not stalled(rising, None) and not stalled([], 1)


# Trackers


def test_one_failing_tracker_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[str, Any]] = []

    class Tracker:
        requires_logging_directory = False
        fails = ""

        def __init__(self, project: str) -> None:
            told.append(("init", project))

        def __getattr__(self, name: str) -> Any:
            if name == type(self).fails:
                raise SystemExit("no login") if name == "start" else ConnectionError("the service is down")
            return lambda *args, **values: told.append((name, args))

    kinds = {name: type(name, (Tracker,), {"fails": name}) for name in ("start", "log", "finish")}
    monkeypatch.setattr("accelerate.tracking.LOGGER_TYPE_TO_CLASS", {**kinds, "fine": type("fine", (Tracker,), {})})
    trackers = Trackers(["start", "log", "finish", "fine"], tmp_path, {"rank": 4})
    trackers.log({"loss": 1.0}, 1)
    trackers.log({"loss": 2.0}, 2)
    trackers.finish()
    assert [name for name, _ in told].count("log") == 4  # twice by two of them
    assert [name for name, _ in told].count("finish") == 1
    assert caplog.text.count("is not used any more") == 3


def test_tensorboard_gets_losses_and_scores(measured: Configure) -> None:
    folder = train(measured(report_to="tensorboard")).adapter_path.parent
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs" / "nora-dreambooth"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("validation/clip_t")] == [0, 2, 4]
