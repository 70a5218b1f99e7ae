"""Duplicates, small photos and the data report."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageEnhance
from runs import Configure

from nora_diffusion.data import Reject, SourceImage, read_images, read_source
from nora_diffusion.data.fingerprint import dhash
from nora_diffusion.data.report import DataReport, Row
from nora_diffusion.data.similarity import find_duplicates
from nora_diffusion.data.transforms import Transform
from nora_diffusion.errors import UserError
from nora_diffusion.training import train

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="module")
def dogs() -> list[SourceImage]:
    return read_images(EXAMPLES / "photos" / "dog6")


def altered(image: Image.Image, how: str) -> Image.Image:
    if how == "half":
        return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    if how == "brighter":
        return ImageEnhance.Brightness(image).enhance(1.15)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=40)
    return Image.open(buffer).convert("RGB")


def test_dhash_is_the_signs_of_differences() -> None:
    pixels = [[(37 * x * x + 91 * y) % 251 for x in range(9)] for y in range(8)]
    image = Image.new("L", (9, 8))
    image.putdata([value for row in pixels for value in row])
    bits = "".join(str(int(row[x] > row[x + 1])) for row in pixels for x in range(8))
    assert dhash(image) == int(bits, 2)
    assert dhash(image.resize((90, 80), Image.Resampling.NEAREST)) == int(bits, 2)


def test_different_photos_are_not_duplicates(dogs: list[SourceImage]) -> None:
    assert not find_duplicates([*dogs, *read_images(EXAMPLES / "photos" / "rc_car")])
    assert not find_duplicates(read_images(EXAMPLES / "subjects" / "tiger"))


@pytest.mark.parametrize("how", ["half", "brighter", "JPEG"])
def test_copies_are_found(dogs: list[SourceImage], how: str, tmp_path: Path) -> None:
    altered(dogs[2].image, how).save(tmp_path / "copy.png")
    copy = replace(read_source(tmp_path / "copy.png"), path=Path("copy.jpg"))
    (pair,) = find_duplicates([*dogs, copy])
    assert (pair.first.path.name, pair.second.path.name, pair.same_file) == ("02.jpg", "copy.jpg", False)


def test_the_same_file_twice(dogs: list[SourceImage]) -> None:
    (pair,) = find_duplicates([dogs[0], dogs[0]])
    assert pair.same_file and str(pair) == "00.jpg and 00.jpg are the same photo"


def test_report_shows_every_view_and_escapes_names(dogs: list[SourceImage], tmp_path: Path) -> None:
    unsafe = replace(
        dogs[1],
        remarks=("rotated by its EXIF orientation",),
        path=Path(shutil.copy(dogs[1].path, tmp_path / "<b onload=x>.png")),
    )
    views = Transform([(64, 48)], "random", 2, flip=True).views(unsafe.image.size)
    rows = [Row(unsafe, "a <script> dog", views)]
    page = DataReport(rows, [Reject(Path("x.png"), "x.png is empty")], findings=["2 captions <are> lost."]).write(
        tmp_path
    )
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r'src="data:image/jpeg;base64,', text)) == len(views) >= 2
    assert "<script" not in text and "<b onload" not in text and "&lt;script&gt; dog" in text
    assert "x.png is empty" in text and "rotated by its EXIF orientation" in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    data = json.loads((tmp_path / "data_report.json").read_text(encoding="utf-8"))
    (photo,) = data["photos"]
    assert photo["caption"] == "a <script> dog" and photo["shape"] == [64, 48] and len(photo["views"]) == len(views)
    assert data["rejects"] == [{"file": "x.png", "reason": "x.png is empty"}]
    assert data["findings"] == ["2 captions <are> lost."] and "2 captions &lt;are&gt; lost." in text


def test_thumbnails_show_the_views(tmp_path: Path) -> None:
    """Thumbnails show the view after crop and resize."""
    image = Image.new("RGB", (80, 40), (200, 30, 40))
    image.paste((20, 40, 210), (40, 0, 80, 40))
    image.save(tmp_path / "p.png")
    photo = read_source(tmp_path / "p.png")
    (view,) = Transform([(40, 40)]).views(image.size)
    from base64 import b64decode

    text = DataReport([Row(photo, "", [view])]).write(tmp_path).read_text()
    found = re.search(r'width="128" height="128" alt="p.png" src="data:image/jpeg;base64,([^"]+)"', text)
    assert found
    thumbnail = Image.open(io.BytesIO(b64decode(found.group(1))))
    assert thumbnail.size == (40, 40)
    left, right = thumbnail.getpixel((5, 20)), thumbnail.getpixel((35, 20))
    assert isinstance(left, tuple) and isinstance(right, tuple)
    assert left[0] > 180 > 60 > left[2] and right[2] > 180 > 60 > right[0]


def test_a_run_writes_its_report(configure: Configure, photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = configure(resolution=32, max_train_steps=1)
    train(config)
    data = json.loads((config.folder / "data_report.json").read_text())
    assert [photo["file"] for photo in data["photos"]] == [path.name for path in sorted(photos.glob("*.png"))]
    assert all(photo["enlarged"] == 1.6 and "too small" in photo["remarks"][0] for photo in data["photos"])
    assert "0.png (1.6 times)" in caplog.text
    assert (config.folder / "data_report.html").is_file()


def test_unusable_files_stop_a_run_or_are_skipped(
    configure: Configure, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(photos, tmp_path / "some")
    (folder / "bad.png").write_bytes(b"")
    shutil.copy(folder / "0.png", folder / "copy.png")
    with pytest.raises(UserError, match=r"bad.png is empty; replace or remove them"):
        train(configure(instance_data_dir=str(folder)))
    config = configure(instance_data_dir=str(folder), skip_unreadable=True, max_train_steps=1)
    train(config)
    data = json.loads((config.folder / "data_report.json").read_text())
    assert data["rejects"] == [{"file": "bad.png", "reason": "bad.png is empty"}] and len(data["photos"]) == 4
    assert data["duplicates"] == [{"files": ["0.png", "copy.png"], "bits": 0, "same_file": True}]
    assert "skipped: bad.png is empty" in caplog.text and "are the same photo" in caplog.text
    assert read_source(folder / "copy.png").sha256 == data["photos"][0]["sha256"]
