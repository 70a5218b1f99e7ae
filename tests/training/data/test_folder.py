"""Masks and folders in the layouts of other tools, and files that are left out."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from factories import write_photos
from PIL import Image
from runs import Configure

from nora_diffusion.cli import main
from nora_diffusion.data import find_images, read_images
from nora_diffusion.data.folder import find_masks, has_masks, left_out
from nora_diffusion.data.masks import with_masks
from nora_diffusion.errors import UserError
from nora_diffusion.training import check, train

MASK = Image.new("L", (24, 20), 0)
MASK.paste(255, (2, 4, 10, 16))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", 2)


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    MASK.save(path)
    return path


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


@pytest.mark.parametrize(
    "name",
    [
        "photos/0-masklabel.png", "photos/0-MASKLABEL.PNG", "photos/0_mask.png", "photos/0.mask.png",
        "photos/0-mask.webp", "photos/0.png-mask.png", "photos/masks/0.png", "photos/masks/0.jpg",
        "photos/masks/0_mask.png", "photos/mask/0.png", "photos/conditioning/0.png", "photos_mask/0.png",
        "photos_masks/0.png", "photos/mask_0.png", "photos/Mask-0.png", "photos/0_matte.png", "photos/0-seg.png",
        "photos/0_segmentation.png", "photos/0_alpha.png", "photos/masks/mask_0.png",
    ],
)  # fmt: skip
def test_masks_of_other_tools_are_masks_and_no_photos(name: str, photos: Path) -> None:
    mask = put(photos.parent / name)
    assert names(find_images(photos)) == ["0.png", "1.png"] and has_masks(photos)
    found, unused = find_masks(photos, find_images(photos))
    assert found == {photos / "0.png": mask} and not unused
    first, second = with_masks(read_images(photos), photos)
    assert first.mask is not None and first.mask.box == (2, 4, 10, 16) and second.mask is None
    assert any("mask is not used" in text for text in left_out(photos, False).findings) == (photos in mask.parents)


def test_masks_that_a_run_does_not_use_are_a_finding(photos: Path, configure: Configure) -> None:
    put(photos / "0-masklabel.png")
    put(photos / "masks" / "1.png")
    config = configure(instance_data_dir=str(photos))
    words = "2 masks are not used (masks/1.png, 0-masklabel.png): use them with --background_loss_weight 0.2 or --crop"
    assert any(words in finding.text for finding in check(config))
    for changes in ({"background_loss_weight": 0.5}, {"crop": "subject"}):
        used = check(configure(instance_data_dir=str(photos), **changes))
        assert not any("not used" in finding.text for finding in used)


def test_a_photo_of_a_mask_is_a_photo_and_what_onetrainer_adds_is_not(photos: Path) -> None:
    kept = ["gas_mask.png", "mask.png", "mask_9.png", "project-alpha.png", "unmasked.png"]
    for name in (*kept, "9-masklabel.png", "0-condlabel.png"):
        put(photos / name)
    assert names(find_images(photos)) == ["0.png", "1.png", *kept]
    assert names(find_masks(photos, find_images(photos))[1]) == ["9-masklabel.png"]
    (finding,) = left_out(photos, True).findings
    assert finding == "1 conditioning image is left out (0-condlabel.png): remove them."


def test_mask_names_are_compared_as_unicode(tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos", 1)
    (folder / "0.png").rename(folder / unicodedata.normalize("NFD", "hündchen.png"))
    put(folder / unicodedata.normalize("NFC", "hündchen-masklabel.png"))
    (photo,) = with_masks(read_images(folder), folder)
    assert photo.mask is not None


def test_files_that_are_not_read_are_listed(configure: Configure, photos: Path, tmp_path: Path) -> None:
    for name in ("a.NEF", "b.dng", "c.psd", "d.tga", "e.ico", "f.jp2", "g.ppm", "clip.MOV", "h.svg", "i"):
        (photos / name).write_bytes(b"not read")
    for name in ("0.txt", "metadata.csv", "0.json", "0.npz", ".DS_Store", "Thumbs.db", "0.xmp"):
        (photos / name).write_bytes(b"{}")
    put(photos / "more" / "2.png")
    put(photos / ".cache" / "3.png")
    put(photos / "scoring" / "4.png")  # kept for evaluation
    config = configure(instance_data_dir=str(photos), max_train_steps=1)
    texts = "\n".join(finding.text for finding in check(config))
    assert "10 files are left out, in formats that are not read (a.NEF, b.dng, c.psd, clip.MOV, d.tga" in texts
    assert "1 photo is left out, in sub-folders (more/2.png): move them into" in texts
    with pytest.raises(UserError, match="in formats that are not read"):
        train(configure(instance_data_dir=str(photos), max_train_steps=1, strict=True))
    train(config)
    report = json.loads((config.folder / "data_report.json").read_text())
    assert len(report["left_out"]) == 11
    assert report["left_out"][0]["reason"] == "a.NEF is left out, in formats that are not read"
    assert "more/2.png is left out, in sub-folders" in (config.folder / "data_report.html").read_text()
    assert main(["data", str(photos), "--out", str(tmp_path / "report"), "--resolution", "32"]) == 0
    assert len(json.loads((tmp_path / "report" / "data_report.json").read_text())["left_out"]) == 11


def test_own_folders_inside_the_photo_folder_are_not_photos(configure: Configure, photos: Path) -> None:
    config = configure(instance_data_dir=str(photos), output_dir=str(photos / "run"))
    put(photos / "run" / "class_images" / "1.png")
    assert not any("sub-folder" in finding.text for finding in check(config))
    put(photos / "masks" / "0.png")
    assert not any("sub-folder" in finding.text for finding in check(config))


@pytest.mark.parametrize("inner", ["10_sks dog", "img/10_sks dog"])
def test_the_layout_of_kohyas_scripts_gets_a_hint(inner: str, tmp_path: Path) -> None:
    write_photos(tmp_path / "train" / inner, 3)
    with pytest.raises(UserError) as error:
        find_images(tmp_path / "train")
    for words in (f"--instance_data_dir '{tmp_path / 'train' / inner}'", "--instance_prompt 'a photo of sks dog'",
                  "repeats are not used: --max_train_steps"):  # fmt: skip
        assert words in str(error.value)
    assert len(find_images(tmp_path / "train" / inner)) == 3
