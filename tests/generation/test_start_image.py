"""Which part of an image is generated, at which size, and what stays of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import write_photos
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nora_diffusion import Sampling, UserError
from nora_diffusion.generation.start_image import StartImage


def picture(folder: Path, size: tuple[int, int], name: str = "photo.png") -> Path:
    """An image in which every pixel is another color."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    Image.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.uint8)).save(folder / name)
    return folder / name


def mask_of(folder: Path, size: tuple[int, int], *boxes: tuple[int, int, int, int], name: str = "mask.png") -> Path:
    """White boxes on black."""
    mask = Image.new("L", size)
    for box in boxes:
        mask.paste(255, box)
    mask.save(folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("size", "given", "expected"),
    [
        ((512, 512), (None, None), (64, 64)),
        ((400, 100), (None, None), (128, 32)),
        ((300, 200), (None, None), (80, 48)),  # 64 * 64 pixels of 3:2, in multiples of 16
        ((300, 200), (96, None), (96, 64)),
        ((300, 200), (None, 32), (48, 32)),
        ((300, 200), (40, 72), (40, 72)),
    ],
)
def test_the_size_follows_from_the_image(
    tmp_path: Path, size: tuple[int, int], given: tuple[int | None, int | None], expected: tuple[int, int]
) -> None:
    frame = StartImage(picture(tmp_path, size)).frame(64, 16, *given)
    assert frame.size == frame.image.size == expected
    left, top, right, bottom = frame.box  # cropped as little as possible, in the middle
    assert left + right in range(size[0] - 1, size[0] + 2) and top + bottom in range(size[1] - 1, size[1] + 2)
    assert (right - left, bottom - top)[0] == size[0] or bottom - top == size[1]
    assert (right - left) / (bottom - top) == pytest.approx(expected[0] / expected[1], rel=0.03)


@given(
    size=st.tuples(st.integers(40, 300), st.integers(40, 300)).filter(lambda s: max(s) < 7 * min(s)),
    corner=st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)), part=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)),
    padding=st.integers(0, 80), target=st.sampled_from([(None, None), (64, 64), (96, 48), (32, 128)]),
)  # fmt: skip
def test_the_box_around_a_mask_lies_in_the_image(
    tmp_path_factory: pytest.TempPathFactory, size: Any, corner: Any, part: Any, padding: int, target: Any
) -> None:
    folder = tmp_path_factory.mktemp("box")
    left, top = int(corner[0] * size[0]), int(corner[1] * size[1])
    white = (left, top, left + max(1, int(part[0] * (size[0] - left))), top + max(1, int(part[1] * (size[1] - top))))
    start = StartImage(picture(folder, size), mask=mask_of(folder, size, white), padding=padding)
    frame = start.frame(64, 16, *target)
    box = frame.box
    assert start.region == white
    assert 0 <= box[0] <= white[0] and white[2] <= box[2] <= size[0]
    assert 0 <= box[1] <= white[1] and white[3] <= box[3] <= size[1]
    assert box[0] <= max(0, white[0] - padding) and box[2] >= min(size[0], white[2] + padding)
    assert all(side % 16 == 0 for side in frame.size)
    area = (target[0] or 64) * (target[1] or 64)
    assert frame.size[0] * frame.size[1] == pytest.approx(area, rel=0.6)
    whole = frame.finished(Image.new("RGB", frame.size, "white"))
    changed = np.asarray(whole) != np.asarray(frame.whole)
    outside = np.ones(size[::-1], bool)
    outside[box[1] : box[3], box[0] : box[2]] = False
    assert whole.size == size and not changed[outside].any()


def test_only_the_mask_changes(tmp_path: Path) -> None:
    path = picture(tmp_path, (256, 128))
    start = StartImage(path, mask=mask_of(tmp_path, (256, 128), (0, 0, 128, 128)))
    frame = start.frame(128, 16, 256, 128)
    made = np.asarray(frame.finished(Image.new("RGB", (256, 128), "white")))
    before = np.asarray(Image.open(path))
    assert (made[:, :118] == 255).all() and (made[:, 138:] == before[:, 138:]).all()
    border = made[64, 118:138, 1].astype(int)
    assert (np.diff(border) <= 0).all() and len(set(border)) > 5  # soft


def test_a_mask_may_be_the_opaque_part_of_an_image(tmp_path: Path) -> None:
    strokes = Image.new("RGBA", (64, 64))
    strokes.paste((0, 0, 0, 255), (10, 20, 30, 40))
    strokes.save(tmp_path / "strokes.png")
    start = StartImage(picture(tmp_path, (64, 64)), mask=tmp_path / "strokes.png")
    start.check(Sampling(10, 2.0))
    assert start.region == (10, 20, 30, 40)


def test_photos_are_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert StartImage(tmp_path / "turned.jpg").frame(64, 16, None, 64).size == (32, 64)


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    photo = picture(tmp_path, (64, 64))
    (tmp_path / "text.png").write_text("no image")
    black = mask_of(tmp_path, (64, 64), name="black.png")
    wide = mask_of(tmp_path, (128, 64), (0, 0, 9, 9), name="wide.png")
    white = mask_of(tmp_path, (64, 64), (0, 0, 9, 9))
    for start, message in [
        (StartImage(tmp_path / "none.png"), "the image .*none.png cannot be used"),
        (StartImage(tmp_path / "text.png"), "the image .*text.png"),
        (StartImage(photo, mask=tmp_path / "text.png"), "the mask .*text.png"),
        (StartImage(photo, mask=black), "nothing white"),
        (StartImage(photo, mask=wide), "128x64, the image 64x64"),
        (StartImage(photo, strength=0), "strength=0"),
        (StartImage(photo, strength=float("nan")), "strength=nan"),
        (StartImage(photo, strength=1.5), "strength=1.5"),
        (StartImage(photo, strength=0.05), "less than one step"),
        (StartImage(photo, padding=8), "give a mask"),
        (StartImage(photo, mask=white, padding=-1), "padding=-1"),
    ]:
        with pytest.raises(UserError, match=message):
            start.check(Sampling(10, 2.0))
    StartImage(photo, 0.1, white, 0).check(Sampling(10, 2.0))


def test_it_is_recorded(tmp_path: Path) -> None:
    (photo,) = sorted(write_photos(tmp_path / "photos", 1).glob("*.*"))[:1]
    start = StartImage(photo, 0.5, mask_of(tmp_path, Image.open(photo).size, (0, 0, 8, 8)), 4)
    found = start.settings()
    assert (found["image"], found["mask"], found["strength"], found["padding"]) == (photo.name, "mask.png", 0.5, 4)
    assert len(str(found["sha256"])) == len(str(found["mask_sha256"])) == 64
