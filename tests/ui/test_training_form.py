"""What the Train tab accepts: photos, with reasons for rejects, and settings that a page may set."""

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
from nora_diffusion.training.settings.checks import check_config
from nora_diffusion.training.settings.defaults import with_defaults
from nora_diffusion.training.step.denoiser import bucket_multiple
from nora_diffusion.ui.engine import Engine
from nora_diffusion.ui.jobs.images import check_images
from nora_diffusion.ui.jobs.training_form import build_settings, preflight, read_extra


@pytest.mark.parametrize(
    ("trigger", "word", "message"),
    [
        ("sks", " ", "'Class word' is empty: enter one word, for example dog"),
        ("sks", "golden retriever", "'Class word' is 'golden retriever': enter one word, for example golden-retriever"),
        ("", "dog", "'Trigger word' is empty: enter one word, for example sks"),
        ("<sks>", "dog", "'Trigger word' is '<sks>': enter one word, for example sks"),
    ],
)
def test_a_missing_word_is_named_by_its_field(engine: Engine, trigger: str, word: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_settings(engine, "Fast", trigger, word, {})
    assert str(caught.value) == message


@pytest.fixture(scope="module")
def engine(tiny_base: Path) -> Engine:
    return Engine(BaseSource(str(tiny_base), "cpu"))


def bomb(path: Path, width: int = 16000, height: int = 8000) -> Path:
    """A small PNG file with very many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * (height * (width // 8 + 1)), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def test_each_photo_is_cropped_or_refused_with_a_reason(engine: Engine, tmp_path: Path) -> None:
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
    found = check_images(files, engine, {"crop": "center"})
    assert [bool(c.crops) for c in found] == [True, True, *[False] * 7]
    reasons = ["same photo", "megapixels", "not a JPEG", "not a JPEG", "empty", "is TIFF", "smaller than"]
    for photo, reason in zip(found[2:], reasons, strict=True):
        assert reason in photo.error and photo.path.name in photo.error
    with Image.open(good[0]) as opened:
        expected = np.asarray(opened.resize((16, 16), Image.Resampling.LANCZOS, box=(8, 0, 40, 32)), dtype=int)
    (crop,) = found[0].crops
    assert np.abs(np.asarray(crop, dtype=int) - expected).max() <= 1
    assert found[0].remark == "" and "enlarged 2.0 times" in check_images(good, engine, {"resolution": 64})[0].remark
    with pytest.raises(UserError, match="too many"):
        check_images(good * 60, engine, {})


def test_the_crops_are_those_of_the_trainer(engine: Engine, tmp_path: Path) -> None:
    """Every crop of a run with these settings is shown, pixel for pixel."""
    photos = sorted(write_photos(tmp_path, 2, (48, 32)).glob("*.png"))
    settings = build_settings(engine, "Fast", "sks", "dog", {"seed": 5, "random_flip": True})
    config = with_defaults(TrainConfig.from_mapping({**settings, "instance_data_dir": str(tmp_path), "resolution": 16}))
    read = read_images(tmp_path)
    views = views_of(transform_of(config, 16, bucket_multiple(engine.pipe)), read, 5)
    found = check_images(photos, engine, settings)
    assert len(found[0].crops) == 8  # four crops and their mirror images
    for photo, own, checked in zip(read, views, found, strict=True):
        assert [p.tobytes() for p in checked.crops] == [view.apply(photo.image).tobytes() for view in own]
    with Image.open(photos[0]) as opened:
        opened.point(lambda value: min(255, value + 3)).save(tmp_path / "lighter.png")
    again = check_images([*photos, tmp_path / "lighter.png", photos[0]], engine, settings)
    assert f"looks like {photos[0].name}" in again[2].remark and again[2].crops
    assert "is the same photo as" in again[3].error and not again[3].crops


def test_presets_scale_the_defaults_of_the_base(engine: Engine) -> None:
    found = {name: build_settings(engine, name, "sks", "dog", {}) for name in ("Fast", "Balanced", "Best")}
    assert [s["max_train_steps"] for s in found.values()] == [167, 500, 1250]
    assert found["Best"]["learning_rate"] < found["Balanced"]["learning_rate"]
    own = build_settings(
        engine, "Fast", "sks", "dog", {"max_train_steps": 7, "learning_rate": None}, "rank: 5\nseed: 3"
    )
    assert (own["max_train_steps"], own["rank"], own["seed"]) == (7, 5, 3) and own["learning_rate"] > 0
    for settings in (*found.values(), own):  # the trainer accepts them
        check_config(TrainConfig.from_mapping({**settings, "instance_data_dir": "photos"}))


def test_the_default_rate_is_that_of_the_optimizer_and_of_the_ranks(engine: Engine) -> None:
    def rate(**own: str) -> float:
        return float(build_settings(engine, "Balanced", "sks", "dog", {"method": "lora", **own})["learning_rate"])

    assert rate(optimizer="lora_pro") == rate() / 4
    assert rate(rank_allocation="adalora") == 4 * rate()


def test_more_settings_are_parsed_as_the_trainer_parses_them(engine: Engine) -> None:
    own = build_settings(engine, "Fast", "sks", "dog", {}, "max_train_steps: 1e3\nlora_dropout: '0.1'")
    assert (own["max_train_steps"], own["validation_steps"], own["dropout"]) == (1000, 200, 0.1)


REFUSED = {
    "output_dir: /etc": "the app sets",
    "pretrained_model_name_or_path: /somewhere": "the app sets",
    "class_data_dir: /home": "the app sets",
    "resume_from_checkpoint: /tmp/x": "the app sets",
    "push_to_hub: true": "the app sets",
    "hub_token: x": "the app sets",
    "report_to: wandb": "the app sets",
    "local_rank: 3": "the app sets",
    "rnak: 3": "did you mean",
    "- 3": "lines",
    "rank: [": "more settings, line 1 is not valid YAML: the brackets are not closed",
    "rank: 3\nrank: 4": "more settings, line 2: 'rank' is also in line 1",
    "dropout: 0.1\nlora_dropout: 0.1": "more settings has dropout under two names",
    "a: &x [[1]]\nb: *x": "must stand for text",
    "x" * 5000: "at most",
    "max_train_steps: many": "max_train_steps='many' is not valid: give a whole number",
    "!!python/object/apply:os.system ['true']": "more settings, line 1: tags such as !!python/object/apply:os.system",
    "seed: 12:30": "seed='12:30' is not valid: give a whole number",
}


def test_text_of_more_settings_stays_text() -> None:
    found = read_extra("validation_prompt: 0123\nmixed_precision: no\nclass_prompt: a cat & a dog\nrank: 010")
    expected = {"validation_prompt": "0123", "mixed_precision": "no", "class_prompt": "a cat & a dog", "rank": 10}
    assert found == expected


@pytest.mark.parametrize("text", REFUSED)
def test_settings_that_a_page_may_not_set(text: str) -> None:
    with pytest.raises(UserError, match=REFUSED[text]):
        read_extra(text)


@pytest.mark.parametrize(
    ("preset", "trigger", "word", "message"),
    [
        ("Huge", "sks", "dog", "no preset"), ("Fast", "", "dog", "'Trigger word' is empty"),
        ("Fast", "s k", "dog", "'Trigger word' is 's k'"), ("Fast", "<lora:x>", "dog", "'Trigger word'"),
        ("Fast", "sks", "", "'Class word' is empty"), ("Fast", "sks", "d" * 50, "'Class word'"),
    ],
)  # fmt: skip
def test_words_are_checked(engine: Engine, preset: str, trigger: str, word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_settings(engine, preset, trigger, word, {})


def test_the_warnings_of_the_trainer_are_shown(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = sorted(write_photos(tmp_path / "photos", 3).glob("*.png"))
    small = {"rank": 4, "inner_rank": 2, "basis": "svd", "train_batch_size": 1, "max_train_steps": 60}

    def warnings(trigger: str = "zwxq", photos: list[Path] = photos, **changes: Any) -> str:
        settings = build_settings(engine, "Fast", trigger, "dog", {**small, **changes})
        return " ".join(preflight(engine, settings, photos, tmp_path))

    assert warnings() == ""
    assert "There is only 1 photo: use 3 to 10" in warnings(photos=photos[:1])
    photos[1].with_suffix(".txt").write_text("a zwxq dog on grass")
    lost = (
        "2 of 3 photos have no caption (0.png, 2.png) and get the prompt 'a zwxq dog' instead: add a text file such as "
    )
    assert warnings(use_captions=True) == lost + "0.txt."
    photos[1].with_suffix(".txt").unlink()
    assert "The base already knows the trigger 'cat'" in warnings("cat")
    assert "The validation prompt lacks the trigger 'zwxq'" in warnings(validation_prompt="a dog")
    assert "A learning_rate of 0.5 is outside the usual" in warnings(learning_rate=0.5)  # no dashes on a page
    assert "use max_train_steps 30 or more" in warnings(max_train_steps=3)
    for change, message in (({"rank": -1}, "rank"), ({"target_modules": ["nothing"]}, "matches no projection")):
        with pytest.raises(UserError, match=message):
            warnings(**change)
    with pytest.raises(UserError, match="no photos"):
        warnings(photos=[])
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(UserError, match="free some space"):
        warnings()
    assert not (tmp_path / ".jobs").exists()
