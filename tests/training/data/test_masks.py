"""Subject masks: their sources, crops that contain the subject, the weighted loss."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import write_photos
from PIL import Image
from runs import Configure

from nora_diffusion.data import SourceImage, read_images
from nora_diffusion.data.masks import mask_pixels, subject_box, with_masks
from nora_diffusion.data.transforms import Transform, View
from nora_diffusion.errors import UserError
from nora_diffusion.pipelines.base import load_base
from nora_diffusion.training import check, train
from nora_diffusion.training.data.latents import encode_images
from nora_diffusion.training.step.objective import Objective

SCHEDULER = load_base().scheduler


def paint(box: tuple[int, int, int, int], size: tuple[int, int] = (24, 20)) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def mask_of(photo: SourceImage) -> Image.Image:
    mask = mask_pixels(photo)
    assert mask is not None
    return mask


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """Three photos of 24 x 20: with a mask file, with transparency, without a mask."""
    folder = write_photos(tmp_path / "masked", 3)
    (folder / "masks").mkdir()
    paint((2, 4, 10, 16)).save(folder / "masks" / "0.png")
    cut = Image.open(folder / "1.png").convert("RGB")
    cut.putalpha(paint((12, 0, 24, 20)))
    cut.save(folder / "1.png")
    return folder


def test_masks_come_from_the_folder_or_transparency(masked: Path) -> None:
    first, second, third = with_masks(read_images(masked), masked)
    assert first.mask is not None and first.mask.box == subject_box(mask_of(first)) == (2, 4, 10, 16)
    assert second.mask is not None and second.mask.box == subject_box(mask_of(second)) == (12, 0, 24, 20)
    assert third.mask is None and mask_pixels(third) is None


def test_a_mask_of_another_scale_is_resized_and_may_be_transparency(masked: Path) -> None:
    cut = Image.new("RGBA", (48, 40), (9, 9, 9, 0))
    cut.paste((9, 9, 9, 255), (4, 8, 20, 32))
    cut.save(masked / "masks" / "0.png")
    mask = mask_of(with_masks(read_images(masked), masked)[0])
    assert mask.size == (24, 20) and subject_box(mask) == (2, 4, 10, 16)


def test_invalid_masks_are_refused(masked: Path, caplog: pytest.LogCaptureFixture) -> None:
    photos = read_images(masked)
    paint((0, 0, 5, 5), (30, 20)).save(masked / "masks" / "2.png")
    with pytest.raises(UserError, match=r"2.png is 30x20, its photo 24x20"):
        with_masks(photos, masked)
    paint((0, 0, 0, 0)).save(masked / "masks" / "2.png")
    with pytest.raises(UserError, match=r"2.png shows no subject"):
        with_masks(photos, masked)
    (masked / "masks" / "2.png").rename(masked / "masks" / "other.png")
    with_masks(photos, masked)
    assert "no photo has the name of other.png" in caplog.text
    with pytest.raises(UserError, match=r"no photo in .* has a mask: put black and white"):
        with_masks(photos[2:], masked / "nowhere")


def test_regions_are_the_share_of_the_subject_in_each_latent() -> None:
    """Against averages computed by hand, for a crop and its mirror image."""
    mask = paint((6, 0, 14, 12), (24, 16))
    view = View((4, 0, 20, 16), (32, 32))
    cells = np.asarray(mask, dtype=np.float32)[:, 4:20].reshape(4, 4, 4, 4).mean((1, 3)) / 255
    assert np.abs(view.region(mask, (4, 4)) - cells).max() < 0.005
    mirrored = View(view.box, view.shape, mirrored=True).region(mask, (4, 4))
    assert np.array_equal(mirrored, view.region(mask, (4, 4))[:, ::-1])


def test_the_weighted_loss_by_its_formula() -> None:
    torch.manual_seed(0)
    objective = Objective.of(SCHEDULER)
    prediction, latents, noise = torch.randn(3, 2, 4, 6, 5).unbind()
    t, regions = torch.tensor([3, 500]), torch.rand(2, 1, 6, 5)
    target = objective.target(latents, noise, t)
    error = (prediction - target).double() ** 2
    expected = [
        sum(float(regions[b, 0, y, x]) * float(error[b, :, y, x].mean()) for y in range(6) for x in range(5))
        / float(regions[b].sum())
        * float(objective.weights(t)[b])
        for b in range(2)
    ]
    assert objective.losses(prediction, target, t, regions).tolist() == pytest.approx(expected, rel=1e-5)
    even = objective.losses(prediction, target, t, torch.full_like(regions, 0.3))
    torch.testing.assert_close(even, objective.losses(prediction, target, t))
    # With all weights 0 the loss is 0, and positions with weight 0 have no influence.
    assert objective.losses(prediction, target, t, torch.zeros_like(regions)).tolist() == [0, 0]
    regions[:, :, :3] = 0
    changed = prediction.clone()
    changed[:, :, :3] += 5
    assert torch.equal(*(objective.losses(p, target, t, regions) for p in (prediction, changed)))


def test_weights_belong_to_their_views(masked: Path) -> None:
    """With flips and several crops, each view has its own weights."""
    base = load_base()
    photos = with_masks(read_images(masked), masked)
    transform = Transform([(32, 32)], "random", 2, flip=True)
    views = [transform.views(photo.image.size) for photo in photos]
    latents = encode_images(base.vae, photos, views, background=0.25)
    for photo, own, indices in zip(photos, views, latents.views_of_image, strict=True):
        weights = latents.weights(indices)
        assert weights is not None and weights.shape[1:] == (1, *latents.mean[indices[0]].shape[1:])
        for view, weight in zip(own, weights, strict=True):
            side = weight.shape[-1]
            share = 1.0 if photo.mask is None else view.region(mask_of(photo), (side, side))
            assert np.allclose(weight[0], 0.25 + 0.75 * np.asarray(share))
    assert encode_images(base.vae, photos, views).weights([0]) is None


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_with_masks(configure: Configure, masked: Path, tmp_path: Path) -> None:
    """Masks change the result and are part of the run's identity; a background weight of 1 changes nothing."""

    def run(name: str, **changes: Any) -> list[float]:
        train(configure(instance_data_dir=str(masked), output_dir=str(tmp_path / name), max_train_steps=2, **changes))
        return losses(tmp_path / name)

    plain, even = run("plain"), run("even", background_loss_weight=1.0)
    assert even == pytest.approx(plain, rel=1e-5)
    weighted = run("weighted", background_loss_weight=0.0, with_prior_preservation=True, class_prompt="a dog",
                   num_class_images=2)  # fmt: skip
    assert weighted != plain
    run("crops", crop="subject", aspect_buckets=True)
    report = json.loads((tmp_path / "crops" / "data_report.json").read_text())
    assert [photo["mask"] for photo in report["photos"]] == [True, True, False]
    assert "its mask covers 20%" in report["photos"][0]["remarks"]
    assert report["photos"][0]["views"][0]["box"][0] <= 2 and report["photos"][1]["views"][0]["box"][2] == 24

    paint((3, 4, 10, 16)).save(masked / "masks" / "0.png")
    again = configure(instance_data_dir=str(masked), output_dir=str(tmp_path / "crops"), crop="subject",
                      aspect_buckets=True, resume_from_checkpoint="latest")  # fmt: skip
    with pytest.raises(UserError, match="photos and captions"):
        train(again)
    shutil.rmtree(masked / "masks")
    cut_out = read_images(masked)[1].path
    cut_out.unlink()
    with pytest.raises(UserError, match=r"no photo in .* has a mask"):
        train(configure(instance_data_dir=str(masked), background_loss_weight=0.1))


CROPPED = {"background_loss_weight": 0.0, "crop": "center", "train_batch_size": 1}


def test_a_crop_without_the_subject_has_loss_0(configure: Configure, tmp_path: Path) -> None:
    """With background weight 0, such a crop has loss 0 and training goes on."""
    folder = write_photos(tmp_path / "beside", 2)
    (folder / "masks").mkdir()
    paint((0, 0, 1, 1)).save(folder / "masks" / "0.png")
    paint((4, 4, 20, 16)).save(folder / "masks" / "1.png")
    config = configure(instance_data_dir=str(folder), max_train_steps=6, **CROPPED)
    words = "No crop of 1 of 2 photos shows the subject (0.png), so nothing is learned from them: use --crop subject"
    assert [words in finding.text for finding in check(config)].count(True) == 1
    assert train(config).steps == 6
    found = losses(tmp_path / "run")
    assert found.count(0) == 3 and all(loss > 0 for loss in found if loss)


def test_a_crop_between_two_parts_of_the_subject_shows_none(configure: Configure, tmp_path: Path) -> None:
    """The box around both parts is the whole photo; also beside class images, whose loss is not 0."""
    folder = write_photos(tmp_path / "beside", 2, (48, 20))
    (folder / "masks").mkdir()
    parts = paint((0, 0, 2, 20), (48, 20))
    parts.paste(255, (46, 0, 48, 20))
    for number, mask in enumerate((parts, paint((20, 4, 30, 16), (48, 20)))):
        mask.save(folder / "masks" / f"{number}.png")
    config = configure(instance_data_dir=str(folder), max_train_steps=2, **CROPPED)
    assert "No crop of 1 of 2 photos shows the subject (0.png)" in "\n".join(found.text for found in check(config))
    parts.save(folder / "masks" / "1.png")
    for changes in ({}, {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 1}):
        with pytest.raises(UserError, match="No crop of 2 of 2 photos shows the subject"):
            train(replace(config, **changes))
    assert not config.folder.exists()


@pytest.mark.parametrize("changes", [{}, {"skip_unreadable": True}])
def test_photos_of_a_single_color_are_nothing_to_learn(
    changes: dict[str, Any], configure: Configure, tmp_path: Path
) -> None:
    """As failed exports are, and what is so transparent that only the background is seen."""
    folder = write_photos(tmp_path / "blank", 1)
    Image.new("RGB", (24, 20), (255, 255, 255)).save(folder / "1.jpg")
    config = configure(instance_data_dir=str(folder), **changes)
    text = "\n".join(finding.text for finding in check(config))
    assert "1 of 2 photos are of a single color (1.jpg), so nothing is learned from them: export them again" in text
    Image.new("RGBA", (24, 20), (200, 30, 40, 1)).save(folder / "0.png")
    for begin in (check, train):
        with pytest.raises(
            UserError, match=r"2 of 2 photos are of a single color \(0.png, 1.jpg\), so there is nothing"
        ):
            begin(config)
    assert not config.folder.exists()


def test_a_mask_that_cannot_be_read_is_named_with_its_folder(masked: Path) -> None:
    (masked / "masks" / "0.png").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"the mask .*/masks/0.png cannot be used \(0.png is empty\): replace or remove"
    ):
        with_masks(read_images(masked), masked)


def test_masks_without_a_subject_are_refused(configure: Configure, tmp_path: Path) -> None:
    """If no crop shows the subject, or nothing is opaque, all losses would be 0."""
    folder = write_photos(tmp_path / "beside", 1)
    (folder / "masks").mkdir()
    paint((0, 0, 1, 1)).save(folder / "masks" / "0.png")
    config = configure(instance_data_dir=str(folder), max_train_steps=2, **CROPPED)
    with pytest.raises(UserError, match="No crop of 1 of 1 photos shows the subject"):
        train(config)
    shutil.rmtree(folder / "masks")
    for alpha, words in ((0, "is wholly transparent"), (1, "shows no subject"), (100, "shows no subject")):
        Image.new("RGBA", (24, 20), (200, 30, 40, alpha)).save(folder / "0.png")
        with pytest.raises(UserError, match=words):
            train(config)
    assert not config.folder.exists()


@pytest.mark.parametrize("steps", [3, 200])
def test_a_run_that_learns_nothing_writes_no_adapter(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Whatever the reason for losses of 0; also if the run is resumed."""
    monkeypatch.setattr(Objective, "weights", lambda self, times: torch.zeros(len(times)))
    monkeypatch.setattr("nora_diffusion.training.run.updates.MAX_ZERO_STEPS", 5)
    config = configure(max_train_steps=steps, checkpointing_steps=2)
    with pytest.raises(UserError, match=rf"gradient of all {min(steps, 5)} steps is exactly 0, so nothing was learned"):
        train(config)
    assert not (config.folder / "nora_adapter.safetensors").exists() and losses(config.folder) == [0] * (
        min(steps, 5) - 1
    )
    with pytest.raises(UserError, match="nothing was learned"):
        train(replace(config, resume_from_checkpoint="latest"))
    monkeypatch.undo()
    train(replace(config, resume_from_checkpoint="latest", max_train_steps=6))
    assert (config.folder / "nora_adapter.safetensors").exists()


def test_the_end_of_a_fraction_is_no_learning(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose gradients were 0 until its parameters are no longer trained has learned nothing."""
    monkeypatch.setattr(Objective, "weights", lambda self, times: torch.zeros(len(times)))
    config = configure(max_train_steps=4, denoiser_frac=0.5)
    with pytest.raises(UserError, match="gradient of all 4 steps is exactly 0, so nothing was learned"):
        train(config)


def test_gradients_that_are_clipped_to_0_are_no_learning(configure: Configure) -> None:
    with pytest.raises(UserError, match=r"nothing was learned .*--max_grad_norm"):
        train(configure(max_grad_norm=1e-60))


def test_a_loss_that_is_never_finite_points_to_the_inputs(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first update no learning rate is to blame."""
    monkeypatch.setattr(Objective, "weights", lambda self, times: torch.full((len(times),), float("nan")))
    with pytest.raises(UserError, match=r"not finite at step 1, .*no checkpoint yet: check the photos and the base's"):
        train(configure())
