"""Class images: those that are photos, of another base or unreadable are found before anything is generated."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import write_photos
from PIL import Image
from runs import Configure

from nora_diffusion.data import images, read_images
from nora_diffusion.errors import UserError
from nora_diffusion.generation.image_settings import read_settings, save_image
from nora_diffusion.training import TrainConfig, check, train
from nora_diffusion.training.data.class_images import read_class_images


@pytest.fixture
def with_class(configure: Configure, tmp_path: Path) -> Any:
    photos = write_photos(tmp_path / "photos", 3, (48, 40))

    def with_class(**changes: Any) -> TrainConfig:
        return configure(**{
            "instance_data_dir": str(photos), "with_prior_preservation": True, "class_prompt": "a photo of a dog",
            "class_data_dir": str(tmp_path / "class"), "num_class_images": 3, "max_train_steps": 1,
            "overwrite_output_dir": True, **changes,
        })  # fmt: skip

    return with_class


def findings(config: TrainConfig) -> str:
    return "\n".join(finding.text for finding in check(config) if "class image" in finding.text.lower())


@pytest.mark.parametrize("folder", ["photos", "photos/../photos", "link"])
def test_the_photo_folder_is_no_class_folder(folder: str, with_class: Any, tmp_path: Path) -> None:
    if folder == "link":
        (tmp_path / "link").symlink_to(tmp_path / "photos", target_is_directory=True)
    config = with_class(class_data_dir=str(tmp_path / folder))
    with pytest.raises(UserError, match=r"The class images are the photos themselves .*: choose another"):
        train(config)
    assert not config.folder.exists()


def test_copies_of_photos_are_no_class_images(with_class: Any, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    folder.mkdir()
    shutil.copy(tmp_path / "photos" / "1.png", folder / "renamed.png")
    with pytest.raises(
        UserError, match=r"1 of the class images in .* are copies of photos \(renamed.png\): remove them"
    ):
        train(with_class())
    assert len(list(folder.glob("*.png"))) == 1
    with Image.open(tmp_path / "photos" / "1.png") as photo:
        photo.resize((96, 80)).save(folder / "renamed.png")
    assert "1 of the class images" in findings(with_class()) and "look like photos (renamed.png)" in findings(
        with_class()
    )


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_unreadable_class_images_are_found_before_any_is_generated(
    content: bytes, with_class: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "class"
    folder.mkdir()
    (folder / "a.png").write_bytes(content)
    with pytest.raises(
        UserError, match=r"1 of the class images in .* cannot be used \(a.png is .*\): remove them, or set"
    ):
        train(with_class())
    assert [path.name for path in folder.iterdir()] == ["a.png"]
    config = with_class(skip_unreadable=True)
    assert "they are skipped" in findings(config)
    train(config)
    assert sorted(path.name for path in folder.glob("*.png"))[1:] == [f"class-0000{n}.png" for n in range(3)]


def test_class_images_of_another_base_are_a_finding(with_class: Any, tmp_path: Path) -> None:
    train(with_class())
    folder = tmp_path / "class"
    assert not findings(with_class())
    for number, path in enumerate(sorted(folder.glob("*.png"))):
        settings = read_settings(path)
        settings.base = "another/base"
        with Image.open(path) as image:
            image.load()
        path.unlink()
        save_image(image, folder / f"renamed-{number}.png", settings)
    text = findings(with_class())
    assert "3 of the class images" in text and "were generated with 'another/base', not with '" in text
    assert not findings(with_class(prior_preservation="frozen", class_data_dir=None))


def test_a_deleted_class_image_comes_back_with_an_explanation(
    with_class: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(with_class())
    folder, words = tmp_path / "class", "deleted ones come back the same (class-00001.png): to replace one, put another"
    before = [image.sha256 for image in read_images(folder)]
    assert words not in caplog.text
    (folder / "class-00001.png").unlink()
    train(with_class())
    assert words in caplog.text and [image.sha256 for image in read_images(folder)] == before


def smooth_photos(folder: Path, seed: int, count: int = 3) -> Path:
    """Pictures that survive re-encoding, unlike noise."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    for number in range(count):
        small = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        small.resize((200, 160), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def test_a_re_encoded_copy_of_the_photo_folder_is_refused(with_class: Any, tmp_path: Path) -> None:
    """One image may look like a photo by chance; most photos do not."""
    photos, folder = smooth_photos(tmp_path / "smooth", 0), smooth_photos(tmp_path / "class", 1)
    config = with_class(instance_data_dir=str(photos))
    assert not findings(config)
    for number, ending in enumerate(("jpg", "webp")):
        with Image.open(photos / f"{number}.png") as photo:
            photo.resize((100, 80)).save(folder / f"0{number}.{ending}", quality=60)
        found = [f for f in check(config) if "look like photos" in f.text]
        assert [f.fatal for f in found] == [number == 1]
    with pytest.raises(UserError, match=r"2 of the class images in .* look like photos \(00.jpg, 01.webp\)"):
        train(config)


def test_links_to_the_photos_are_copies(with_class: Any, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    folder.mkdir()
    for photo in (tmp_path / "photos").glob("*.png"):
        (folder / f"link-{photo.name}").symlink_to(photo)
    assert "3 of the class images" in findings(with_class()) and "are copies of photos" in findings(with_class())


@pytest.mark.parametrize("where", ["link", "loop", "file"])
def test_a_class_folder_that_is_none_is_refused_before_anything_is_written(
    where: str, with_class: Any, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("mine")
    config = with_class(class_data_dir=str(tmp_path / where))
    for begin in (check, train):
        with pytest.raises(UserError, match=rf"{where} is a file or a link to nothing: give a folder"):
            begin(config)
    assert not config.folder.exists()


def test_held_out_photos_are_no_class_images(with_class: Any, tmp_path: Path) -> None:
    held = write_photos(tmp_path / "held", 2, (40, 40), seed=9)
    config = with_class(validation_data_dir=str(held), class_word="dog", class_data_dir=str(held))
    assert "The class images are the photos themselves" in findings(config)
    (tmp_path / "class").mkdir()
    shutil.copy(held / "1.png", tmp_path / "class" / "x.png")
    assert "copies of photos (x.png)" in findings(replace(config, class_data_dir=str(tmp_path / "class")))


def test_class_images_that_are_small_blank_or_of_an_adapter_are_findings(with_class: Any, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    for number, image in enumerate((Image.new("RGB", (40, 40)), Image.new("RGB", (40, 40), (7, 3, 1)))):
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{number}.png")
    (blank,) = [f for f in check(with_class()) if "of a single color (0.png, 1.png)" in f.text]
    assert blank.fatal
    write_photos(folder, 3, (20, 20), seed=9)
    text = findings(with_class(resolution=32))
    assert "3 of the class images" in text and "smaller than the 32 pixels of this run (0.png, 1.png, 2.png)" in text
    assert not findings(with_class(resolution=16))
    shutil.rmtree(folder)
    train(with_class())
    path = folder / "class-00001.png"
    settings = read_settings(path)
    settings.adapters = [{"name": "dog", "weight": 1.0, "sha256": ""}]
    with Image.open(path) as image:
        image.load()
    save_image(image, path, settings)
    assert "1 of the class images" in findings(with_class())
    assert "were generated with 'dog', not by the base alone" in findings(with_class())


def test_class_images_in_sub_folders_are_a_finding(with_class: Any, tmp_path: Path) -> None:
    """As in kohya's layout. The photos themselves may lie there."""
    write_photos(tmp_path / "class" / "1_dog", 2, (40, 40), seed=9)
    text = findings(with_class())
    assert "2 images in sub-folders" in text and "are no class images (1_dog/0.png, 1_dog/1.png)" in text
    assert f"set --class_data_dir '{tmp_path / 'class' / '1_dog'}'" in text
    assert not findings(with_class(class_data_dir=str(tmp_path / "other")))
    (tmp_path / "above").mkdir()
    config = with_class(class_data_dir=str(tmp_path / "above"))
    (tmp_path / "photos").rename(tmp_path / "above" / "photos")
    assert not findings(replace(config, instance_data_dir=str(tmp_path / "above" / "photos")))


def test_only_the_class_images_that_are_used_are_read(
    with_class: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder may hold many thousands."""
    folder = write_photos(tmp_path / "class", 5, (40, 40), seed=9)
    (folder / "1.png").write_bytes(b"")
    (folder / "9.png").write_bytes(b"")
    original, read = images._content, []
    monkeypatch.setattr(images, "_content", lambda path: read.append(path.name) or original(path))
    found = read_class_images(with_class(skip_unreadable=True))
    assert [image.path.name for image in found.images] == ["0.png", "2.png", "3.png"]
    assert [reject.path.name for reject in found.rejects] == ["1.png"] and read == [f"{n}.png" for n in range(4)]
