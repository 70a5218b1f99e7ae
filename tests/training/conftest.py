"""Fixtures of the trainer's tests: a small run to vary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_random_pipeline, write_photos
from runs import Configure

from nora_diffusion.training import TrainConfig


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Tensors are tiny, so several threads would only slow the tests down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_v_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base with v-prediction and zero terminal SNR."""
    return tiny_random_pipeline(tmp_path_factory.mktemp("tiny") / "v", "v_prediction")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three random photos."""
    return write_photos(tmp_path_factory.mktemp("photos") / "subject")


@pytest.fixture
def configure(tiny_base: Path, photos: Path, tmp_path: Path) -> Configure:
    """``configure(key=value)`` returns the config of a three-step run in ``tmp_path/run``."""

    def build(**changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "pretrained_model_name_or_path": str(tiny_base),
            "instance_data_dir": str(photos),
            "instance_prompt": "a photo of sks dog",
            "output_dir": str(tmp_path / "run"),
            "max_train_steps": 3,
            "train_batch_size": 2,
            "rank": 4,
            "inner_rank": 2,
            "basis": "svd",
            "learning_rate": 1e-2,
            "mixed_precision": "no",
            "sample_steps": 1,
            "num_validation_images": 1,
            "seed": 7,
        }
        return TrainConfig(**{**values, **changes})

    return build
