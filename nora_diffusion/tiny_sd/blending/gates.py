"""Learned gates (MoLE) as a way to apply two adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...io.files import write_atomic
from ...loaders import delete_adapter, load_adapter, set_adapters
from ...loaders.inject import origin
from ...pipelines.components import components
from ...training.gates.learn import GateConfig, learn_gates
from ...training.settings.config import TrainConfig
from ..examples import TRAINING_KINDS
from .pairs import Pair, prompts, true_scenes

NAME = "gated"
JITTERS = (1000, 1001)
"""Two scenes of each background of the training images."""


@contextmanager
def gated(pipe: Any, subjects: Mapping[str, str], pair: Pair, *, true_images: bool = False) -> Iterator[None]:
    """One adapter with learned gates instead of both, from prompts alone or from 8 true images of both subjects.

    It is kept beside the adapters.
    """
    files = [Path(info.path) for name in subjects if (info := origin(components(pipe), name)) is not None]
    place = files[0].parents[2]
    folder = place / "gates" / f"{'true' if true_images else 'drawn'}-{'+'.join(pair)}"
    images = str(_true_images(place / "true" / "+".join(pair), pair)) if true_images else None
    training = TrainConfig(
        pretrained_model_name_or_path=str(pipe.config._name_or_path),
        mixed_precision="bf16" if pipe.unet.dtype == torch.bfloat16 else "no",
    )
    texts = [] if true_images else prompts(pair, TRAINING_KINDS)
    learn_gates(GateConfig([str(file) for file in files], str(folder), texts, images, training=training))
    load_adapter(pipe, folder, NAME, activate=False)
    set_adapters(pipe, NAME)
    try:
        yield
    finally:
        delete_adapter(pipe, NAME)
        set_adapters(pipe, list(subjects))


def _true_images(folder: Path, pair: Pair) -> Path:
    for number, (image, caption) in enumerate(zip(*true_scenes(pair, TRAINING_KINDS, JITTERS), strict=True)):
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")
        write_atomic(folder / f"{number}.txt", caption)
    return folder
