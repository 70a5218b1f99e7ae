"""Photos and captions, sound and broken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from factories import write_photos
from PIL import Image

from nora_diffusion.captions import guess_class_word, guess_trigger, read_captions, with_trigger
from nora_diffusion.data import crop_boxes, find_photos, read_photo, read_photos, square
from nora_diffusion.errors import UserError

RED, BLUE = (200, 30, 40), (20, 40, 210)


def halves(mode: str = "RGB") -> Image.Image:
    """Left red, right blue, 40 x 20."""
    image = Image.new("RGB", (40, 20), RED)
    image.paste(BLUE, (20, 0, 40, 20))
    return image.convert(mode)


def close(pixel: object, expected: tuple[int, int, int], most: int = 12) -> bool:
    return bool(np.abs(np.asarray(pixel, dtype=int) - np.asarray(expected)).max() <= most)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    halves().save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image = read_photo(tmp_path / "turned.jpg").image
    assert image.size == (20, 40)
    assert close(image.getpixel((10, 5)), RED) and close(image.getpixel((10, 35)), BLUE)


def test_colour_modes_become_rgb(tmp_path: Path) -> None:
    halves("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    halves("P").save(tmp_path / "palette.png")
    halves().save(tmp_path / "plain.webp", quality=95)
    halves().save(tmp_path / "misnamed.jpg", format="PNG")
    halves().save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[halves()], quality=95)
    for photo in read_photos(tmp_path):
        assert photo.image.mode == "RGB"
        assert close(photo.image.getpixel((5, 10)), RED, 40), photo.path.name


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 20), 32768, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert close(read_photo(tmp_path / "deep.png").image.getpixel((3, 3)), (128, 128, 128), 1)


def test_transparency_becomes_white_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layer = halves("RGBA")
    layer.paste((0, 0, 0, 0), (0, 0, 20, 20))
    layer.save(tmp_path / "clear.png")
    image = read_photo(tmp_path / "clear.png").image
    assert close(image.getpixel((5, 5)), (255, 255, 255), 0) and close(image.getpixel((30, 5)), BLUE, 0)
    assert "clear.png is transparent" in caplog.text


def test_all_broken_files_are_named(tmp_path: Path) -> None:
    write_photos(tmp_path, 1)
    halves().save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:300])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.png").write_text("<html>not found</html>")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (5000, 20)).save(tmp_path / "strip.png")
    with pytest.raises(UserError) as error:
        read_photos(tmp_path, workers=2)
    for words in ("cut.jpg is damaged", "empty.png is empty", "page.png is no JPEG", "dot.png is 1x1", "5000x20"):
        assert words in str(error.value)
    assert "0.png" not in str(error.value)


def test_size_is_checked_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halves().save(tmp_path / "large.png")
    monkeypatch.setattr("nora_diffusion.data.MAX_PIXELS", 100)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UserError, match=r"large.png is 40x20, more than"):
        read_photo(tmp_path / "large.png")


def test_folders_without_photos(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        find_photos(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="no photos in"):
        find_photos(tmp_path)
    (tmp_path / "phone.HEIC").write_bytes(b"x")
    with pytest.raises(UserError, match=r"phone.HEIC cannot be read: export as JPEG"):
        find_photos(tmp_path)


def test_crops_cover_the_long_side() -> None:
    boxes = crop_boxes((100, 40), 4, False, np.random.default_rng(0))
    assert len(boxes) == 4 and all(box[2] - box[0] == box[3] - box[1] == 40 for box in boxes)
    assert boxes[0][0] < 15 and boxes[-1][2] > 85
    assert crop_boxes((100, 40), 4, True, np.random.default_rng(0)) == [(30, 0, 70, 40)]
    assert crop_boxes((40, 40), 4, False, np.random.default_rng(0)) == [(0, 0, 40, 40)]


def test_square_is_the_box_in_the_unit_range() -> None:
    pixels = square(halves(), (20, 0, 40, 20), 8, Image.Resampling.LANCZOS)
    assert pixels.shape == (3, 8, 8) and pixels.dtype == np.float32
    expected = np.asarray(BLUE, dtype=np.float32) / 127.5 - 1
    assert np.abs(pixels.mean((1, 2)) - expected).max() < 0.02


def test_captions_from_sidecars_metadata_or_prompt(tmp_path: Path) -> None:
    paths = find_photos(write_photos(tmp_path, 2))
    assert read_captions(paths, "a photo of sks dog") == ["a photo of sks dog"] * 2
    (tmp_path / "0.txt").write_text("a sks dog\n in snow\n")
    assert read_captions(paths, "other", sidecars=True) == ["a sks dog in snow", "other"]
    with pytest.raises(UserError, match=r"1.png has no caption: add a .txt file"):
        read_captions(paths, None, sidecars=True)
    rows = [{"file_name": "0.png", "text": "one"}, {"file_name": "1.png", "text": "two"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_captions(paths, None, column="text") == ["one", "two"]
    with pytest.raises(UserError, match="has no text under 'caption'; its keys are text"):
        read_captions(paths, None, column="caption")
    with pytest.raises(UserError, match="there is no prompt"):
        read_captions(paths, None)


def test_triggers() -> None:
    assert guess_trigger("a photo of sks dog") == "sks"
    assert guess_trigger("a photo of sks dog", class_word="dog") == "sks"
    assert guess_trigger("a photo of dog sks", class_prompt="a photo of a dog") == "sks"
    assert guess_trigger("a photo of a dog") is None
    assert guess_trigger("a photo of a dog", class_word="dog") is None
    assert guess_class_word("a photo of sks toy dog on the beach", "sks") == "toy dog"
    assert with_trigger("a red toy dog in snow", "sks", "toy dog") == "a red sks toy dog in snow"
    assert with_trigger("a sks dog", "sks", "dog") == "a sks dog"
    assert with_trigger("the beach", "sks", "dog") == "sks dog, the beach"
    assert with_trigger("the beach", "sks", None) == "sks, the beach"
