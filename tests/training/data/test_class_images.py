"""Class images: those that are photos, of another base or unreadable are found before anything is generated."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from factories import write_photos
from PIL import Image
from runs import Configure

from nora_diffusion.data import read_images
from nora_diffusion.errors import UserError
from nora_diffusion.generation.image_settings import read_settings, save_image
from nora_diffusion.training import TrainConfig, check, train


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
