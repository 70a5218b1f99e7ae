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
from nora_diffusion.training import TrainConfig
from nora_diffusion.training.checks import check_config
from nora_diffusion.ui.engine import Engine
from nora_diffusion.ui.training_form import Checked, build_settings, check_photos, preflight, read_extra


@pytest.fixture(scope="module")
def engine(tiny_base: Path) -> Engine:
    return Engine(str(tiny_base), "cpu")


def bomb(path: Path, width: int = 16000, height: int = 8000) -> Path:
    """A PNG of many pixels in few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * (height * (width // 8 + 1)), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def test_each_photo_is_shown_as_trained_or_refused_with_a_reason(tmp_path: Path) -> None:
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
    found = check_photos(files, 16)
    assert [c.picture is not None for c in found] == [True, True, *[False] * 7]
    reasons = ["same photo", "megapixels", "no JPEG", "no JPEG", "empty", "is TIFF", "smaller than"]
    for photo, reason in zip(found[2:], reasons, strict=True):
        assert reason in photo.fault and photo.path.name in photo.fault
    with Image.open(good[0]) as opened:
        expected = np.asarray(opened.resize((16, 16), Image.Resampling.LANCZOS, box=(8, 0, 40, 32)), dtype=int)
    assert found[0].picture is not None and np.abs(np.asarray(found[0].picture, dtype=int) - expected).max() <= 1
    assert found[0].remark == "crops along the long side" and "enlarged" in check_photos(good, 64)[0].remark
    with pytest.raises(UserError, match="too many"):
        check_photos(good * 60, 16)


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
    "!!python/object/apply:os.system ['true']": "key: value",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_page_may_not_set_everything(text: str) -> None:
    with pytest.raises(UserError, match=REFUSED[text]):
        read_extra(text)


@pytest.mark.parametrize(
    ("preset", "trigger", "word", "message"),
    [
        ("Huge", "sks", "dog", "no preset"), ("Fast", "", "dog", "trigger"), ("Fast", "s k", "dog", "trigger"),
        ("Fast", "<lora:x>", "dog", "trigger"), ("Fast", "sks", "", "class word"), ("Fast", "sks", "d" * 50, "class"),
    ],
)  # fmt: skip
def test_words_are_checked(engine: Engine, preset: str, trigger: str, word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_settings(engine, preset, trigger, word, {})


def test_preflight_says_what_is_odd(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = [Checked(tmp_path / f"{n}.png", Image.new("RGB", (16, 16))) for n in range(3)]

    def said(trigger: str = "sks", photos: Any = photos, **changes: Any) -> str:
        settings = build_settings(engine, "Fast", trigger, "dog", changes)
        return " ".join(preflight(engine, settings, photos, tmp_path))

    assert said() == ""
    assert "more views" in said(photos=photos[:1])
    assert "left out" in said(photos=[*photos, Checked(tmp_path / "x.png", fault="broken")])
    assert "word that the base knows" in said("beach") and "word that the base knows" not in said("zwxq")
    assert "not in the validation prompt" in said(validation_prompt="a dog")
    assert "far from the usual" in said(learning_rate=0.5)
    for fault, message in (({"rank": -1}, "rank"), ({"target_modules": ["nothing"]}, "matches no projection")):
        with pytest.raises(UserError, match=message):
            said(**fault)
    with pytest.raises(UserError, match="no photo"):
        said(photos=[])
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(UserError, match="free some space"):
        said()
