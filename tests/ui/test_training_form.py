"""What the Train tab accepts: photos, with reasons for rejects; settings, if they are a page's business."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import write_photos
from PIL import Image

from nora_diffusion import UserError
from nora_diffusion.data import read_images
from nora_diffusion.pipelines.base import BaseSource
from nora_diffusion.training import TrainConfig
from nora_diffusion.training.data.dataset import transform_of, views_of
from nora_diffusion.training.run.setup import bucket_step
from nora_diffusion.training.settings.checks import check_config
from nora_diffusion.training.settings.defaults import with_defaults
from nora_diffusion.ui.engine import Engine
from nora_diffusion.ui.jobs.images import check_photos
from nora_diffusion.ui.jobs.training_form import build_settings, preflight, read_extra


@pytest.mark.parametrize(
    ("trigger", "word", "said"),
    [
        ("sks", " ", "'What it is' is empty: give one word, for example dog"),
        ("sks", "golden retriever", "'What it is' is 'golden retriever': give one word, for example golden-retriever"),
        ("", "dog", "'Trigger word' is empty: give one word, for example sks"),
        ("<sks>", "dog", "'Trigger word' is '<sks>': give one word, for example sks"),
    ],
)
def test_a_word_is_asked_for_by_its_field(engine: Engine, trigger: str, word: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        build_settings(engine, "Fast", trigger, word, {})
    assert str(caught.value) == said


@pytest.fixture(scope="module")
def engine(tiny_base: Path) -> Engine:
    return Engine(BaseSource(str(tiny_base), "cpu"))


def bomb(path: Path, width: int = 16000, height: int = 8000) -> Path:
    """A PNG of many pixels in few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * (height * (width // 8 + 1)), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def test_each_photo_is_shown_as_trained_or_refused_with_a_reason(engine: Engine, tmp_path: Path) -> None:
    good = sorted(write_photos(tmp_path, 2, (48, 32)).glob("*.png"))
    twin = tmp_path / "twin.png"
    twin.write_bytes(good[0].read_bytes())
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "vector.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    (tmp_path / "empty.png").touch()
    Image.new("RGB", (30, 30)).save(tmp_path / "tiff.png", "TIFF")
    Image.new("RGB", (4, 4)).save(tmp_path / "dot.png")
    files = [*good, twin, bomb(tmp_path / "bomb.png"), *(tmp_path / n for n in (
        "text.jpg", "vector.png", "empty.png", "tiff.png", "dot.png"))]  # fmt: skip
    assert (tmp_path / "bomb.png").stat().st_size < 30_000
    found = check_photos(files, engine, {"crop": "center"})
    assert [bool(c.pictures) for c in found] == [True, True, *[False] * 7]
    reasons = ["same photo", "megapixels", "not a JPEG", "not a JPEG", "empty", "is TIFF", "smaller than"]
    for photo, reason in zip(found[2:], reasons, strict=True):
        assert reason in photo.fault and photo.path.name in photo.fault
    with Image.open(good[0]) as opened:
        expected = np.asarray(opened.resize((16, 16), Image.Resampling.LANCZOS, box=(8, 0, 40, 32)), dtype=int)
    (shown,) = found[0].pictures
    assert np.abs(np.asarray(shown, dtype=int) - expected).max() <= 1
    assert found[0].remark == "" and "enlarged 2.0 times" in check_photos(good, engine, {"resolution": 64})[0].remark
    with pytest.raises(UserError, match="too many"):
        check_photos(good * 60, engine, {})


def test_what_is_shown_is_what_the_trainer_makes(engine: Engine, tmp_path: Path) -> None:
    """Every crop of a run with these settings, pixel for pixel."""
    photos = sorted(write_photos(tmp_path, 2, (48, 32)).glob("*.png"))
    settings = build_settings(engine, "Fast", "sks", "dog", {"seed": 5, "random_flip": True})
    config = with_defaults(TrainConfig.from_mapping({**settings, "instance_data_dir": str(tmp_path), "resolution": 16}))
    read = read_images(tmp_path)
    views = views_of(transform_of(config, bucket_step(engine.pipe)), read, 5)
    found = check_photos(photos, engine, settings)
    assert len(found[0].pictures) == 8  # four crops, mirrored too
    for photo, own, shown in zip(read, views, found, strict=True):
        assert [p.tobytes() for p in shown.pictures] == [view.apply(photo.image).tobytes() for view in own]
    with Image.open(photos[0]) as opened:
        opened.point(lambda value: min(255, value + 3)).save(tmp_path / "lighter.png")
    again = check_photos([*photos, tmp_path / "lighter.png", photos[0]], engine, settings)
    assert f"looks like {photos[0].name}" in again[2].remark and again[2].pictures
    assert "is the same photo as" in again[3].fault and not again[3].pictures


def test_presets_scale_the_defaults_of_the_base(engine: Engine) -> None:
    found = {name: build_settings(engine, name, "sks", "dog", {}) for name in ("Fast", "Balanced", "Best")}
    assert [s["max_train_steps"] for s in found.values()] == [167, 500, 1250]
    assert found["Best"]["learning_rate"] < found["Balanced"]["learning_rate"]
    own = build_settings(
        engine, "Fast", "sks", "dog", {"max_train_steps": 7, "learning_rate": None}, "rank: 5\nseed: 3"
    )
    assert (own["max_train_steps"], own["rank"], own["seed"]) == (7, 5, 3) and own["learning_rate"] > 0
    for settings in (*found.values(), own):  # the trainer takes them
        check_config(TrainConfig.from_mapping({**settings, "instance_data_dir": "photos"}))


def test_further_settings_are_read_as_the_trainer_reads_them(engine: Engine) -> None:
    own = build_settings(engine, "Fast", "sks", "dog", {}, "max_train_steps: 1e3\nlora_dropout: '0.1'")
    assert (own["max_train_steps"], own["validation_steps"], own["dropout"]) == (1000, 200, 0.1)


REFUSED = {
    "output_dir: /etc": "app's own",
    "pretrained_model_name_or_path: /somewhere": "app's own",
    "class_data_dir: /home": "app's own",
    "resume_from_checkpoint: /tmp/x": "app's own",
    "push_to_hub: true": "app's own",
    "hub_token: x": "app's own",
    "report_to: wandb": "app's own",
    "local_rank: 3": "app's own",
    "rnak: 3": "did you mean",
    "- 3": "lines",
    "rank: [": "key: value",
    "a: &x [1]\nb: *x": "plain lines",
    "x" * 5000: "at most",
    "max_train_steps: many": "max_train_steps='many' does not fit: give a whole number",
    "!!python/object/apply:os.system ['true']": "key: value",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_page_may_not_set_everything(text: str) -> None:
    with pytest.raises(UserError, match=REFUSED[text]):
        read_extra(text)


@pytest.mark.parametrize(
    ("preset", "trigger", "word", "message"),
    [
        ("Huge", "sks", "dog", "no preset"), ("Fast", "", "dog", "'Trigger word' is empty"),
        ("Fast", "s k", "dog", "'Trigger word' is 's k'"), ("Fast", "<lora:x>", "dog", "'Trigger word'"),
        ("Fast", "sks", "", "'What it is' is empty"), ("Fast", "sks", "d" * 50, "'What it is'"),
    ],
)  # fmt: skip
def test_words_are_checked(engine: Engine, preset: str, trigger: str, word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_settings(engine, preset, trigger, word, {})


def test_the_trainer_s_findings_are_said(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = sorted(write_photos(tmp_path / "photos", 3).glob("*.png"))
    small = {"rank": 4, "inner_rank": 2, "basis": "svd", "train_batch_size": 1, "max_train_steps": 60}

    def said(trigger: str = "zwxq", photos: list[Path] = photos, **changes: Any) -> str:
        settings = build_settings(engine, "Fast", trigger, "dog", {**small, **changes})
        return " ".join(preflight(engine, settings, photos, tmp_path))

    assert said() == ""
    assert "There is only 1 photo: with 3 to 10" in said(photos=photos[:1])
    assert "'cat' is a word that the base knows" in said("cat")
    assert "The validation prompt lacks the trigger 'zwxq'" in said(validation_prompt="a dog")
    assert "A learning_rate of 0.5 is outside the usual" in said(learning_rate=0.5)  # no flags on a page
    assert "use max_train_steps 30 or more" in said(max_train_steps=3)
    for fault, message in (({"rank": -1}, "rank"), ({"target_modules": ["nothing"]}, "matches no projection")):
        with pytest.raises(UserError, match=message):
            said(**fault)
    with pytest.raises(UserError, match="no photo"):
        said(photos=[])
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(UserError, match="free some space"):
        said()
    assert not (tmp_path / ".jobs").exists()
