"""Aspect-ratio buckets in a run: batch shapes, class images, resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DConditionModel
from factories import write_photos
from runs import Configure

from nora_diffusion.training import train


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Two wide photos, a tall one and a square one."""
    folder = tmp_path / "shapes"
    for name, count, size in (("wide", 2, (40, 24)), ("tall", 1, (24, 44)), ("square", 1, (24, 24))):
        for photo in write_photos(tmp_path / name, count, size, seed=len(name)).glob("*.png"):
            folder.mkdir(exist_ok=True)
            shutil.move(photo, folder / f"{name}-{photo.name}")
    return folder


@pytest.mark.parametrize("prior", [False, True], ids=["photos", "photos and class images"])
def test_batches_have_one_shape_and_resume_bit_for_bit(
    prior: bool, configure: Configure, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    original = UNet2DConditionModel.forward

    def forward(self: Any, sample: Any, *inputs: Any, **more: Any) -> Any:
        if self.training:
            seen.append(tuple(sample.shape))
        return original(self, sample, *inputs, **more)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    more: dict[str, Any] = {"instance_data_dir": str(shapes), "aspect_buckets": True, "checkpointing_steps": 3}
    if prior:
        more |= {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2,
                 "class_data_dir": str(tmp_path / "dogs")}  # fmt: skip
    config = configure(max_train_steps=8, **more)
    train(config)
    report = json.loads((config.folder / "data_report.json").read_text())
    expected = {tuple(photo["shape"]) for photo in report["photos"]}
    assert len(expected) == 3 and (16, 16) in expected
    # Latents of this base have half the size of its images.
    assert {(2 * width, 2 * height) for _, _, height, width in seen} == expected
    assert {rows for rows, *_ in seen} == {4 if prior else 2}

    whole = shutil.copytree(config.folder, tmp_path / "whole")
    train(configure(max_train_steps=8, resume_from_checkpoint=str(config.folder / "checkpoints" / "step-3"), **more))
    assert losses(config.folder) == losses(whole)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
