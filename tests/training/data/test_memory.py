"""Photos are decoded one at a time, when their pixels are needed."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from factories import write_photos
from PIL import Image
from runs import Configure

from nora_diffusion.data import Pixels, images, read_images
from nora_diffusion.errors import UserError
from nora_diffusion.scoring.judges import image_features, load_judge
from nora_diffusion.training import train


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many decoded images are in memory, each time another one is decoded."""
    counts: list[int] = []
    decoded: list[weakref.ref[Image.Image]] = []
    original = images._decode

    def counted(*args: Any) -> images.Decoded:
        gc.collect()
        counts.append(sum(reference() is not None for reference in decoded))
        found = original(*args)
        decoded.append(weakref.ref(found.image))
        return found

    monkeypatch.setattr(images, "_decode", counted)
    return counts


def test_a_run_does_not_keep_its_photos_in_memory(configure: Configure, tmp_path: Path, alive: list[int]) -> None:
    """Also with masks, class images, held-out photos and validation."""
    folder = write_photos(tmp_path / "photos", 5)
    (folder / "masks").mkdir()
    with Image.open(folder / "0.png") as opened:
        white = Image.new("L", opened.size, 255)
    for number in range(3):
        white.save(folder / "masks" / f"{number}.png")
    train(configure(
        instance_data_dir=str(folder), max_train_steps=2, background_loss_weight=0.5, crop="subject",
        with_prior_preservation=True, class_prompt="a dog", num_class_images=3, class_word="dog", validation_split=2,
        validation_steps=1, judge="tiny", num_validation_images=1,
    ))  # fmt: skip
    assert len(alive) > 20 and max(alive) <= 1  # the judge reads the previous one of a batch


def test_scores_of_many_photos_need_the_memory_of_one(tmp_path: Path, alive: list[int]) -> None:
    photos = read_images(write_photos(tmp_path, 5))
    judge = load_judge()
    pixels = Pixels(photos)
    assert len(pixels) == 5 and len(pixels[1:3]) == 2
    expected = image_features(judge, [photo.image for photo in photos])
    alive.clear()
    gc.collect()
    assert image_features(judge, pixels).equal(expected)
    assert max(alive) <= 1  # the previous one of a batch


def test_a_photo_that_changes_during_the_run_is_refused(tmp_path: Path) -> None:
    (photo,) = read_images(write_photos(tmp_path, 1))
    photo.path.write_bytes(photo.path.read_bytes() + b"x")
    with pytest.raises(UserError, match=r"0.png was changed while it was in use: start again"):
        photo.decode()


def test_too_little_memory_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos(tmp_path, 1)

    def exhausted(*args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "to_rgb", exhausted)
    with pytest.raises(UserError, match=r"0.png needs more memory than there is: save a smaller copy"):
        read_images(tmp_path)


def test_no_more_photos_are_decoded_at_once_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, workers in ((0, 1), (3 * 2**30, 2), (2**40, 8)):
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert images._that_fit(8) == workers


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos(tmp_path, 1)
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 100)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read"))
    with pytest.raises(UserError, match=r"0.png is larger than 0 MiB"):
        read_images(tmp_path)
