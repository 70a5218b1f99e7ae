"""A client's part of a round: train its adapter on its own photos, and send the trained factors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...data.folder import find_images
from ...errors import explanation
from ...formats.adapter_info import parse_info
from ..run.train import train
from ..settings.config import TrainConfig
from ..signals import Interrupted
from .factors import join, packed, split

WORDS = ("trigger", "class_word", "instance_prompt", "prompts", "license")
START = "start"
"""The folder of the adapter that a client starts a round from, in the client's folder."""


@dataclass(frozen=True)
class Update:
    """What a client sends: its trained factors, the number of its photos and the mean loss of its last steps.

    ``words``: trigger, class word and prompts, as the metadata of an adapter has them. ``error``: why it sent no
    factors; then everything else is empty.
    """

    factors: bytes = b""
    photos: int = 0
    loss: float = 0.0
    words: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


def train_round(
    settings: Mapping[str, Any], info: str, frozen: bytes, trained: bytes, working_directory: str
) -> Update:
    """Body of a task: train from these factors; photos and captions stay here.

    ``info``: the metadata of the adapter. ``frozen``: its frozen factors, the same in every round.
    """
    os.chdir(working_directory)
    os.environ["TQDM_DISABLE"] = "1"
    config = TrainConfig(**settings)
    try:
        return _train(config, info, frozen, trained)
    except Interrupted as stop:
        return Update(error=str(stop))
    except Exception as error:
        text = explanation(error)
        if text is None:
            raise
        return Update(error=text)


def _train(config: TrainConfig, info: str, frozen: bytes, trained: bytes) -> Update:
    from safetensors.torch import load

    start = config.folder.parent / START
    join(start, parse_info(info, str(start)), load(frozen), load(trained))
    config.start_from = str(start)
    result = train(config)
    found = split(result.adapter_path)
    photos = len(find_images(Path(config.instance_data_dir or "").expanduser()))
    words = {name: getattr(found.info, name) for name in WORDS}
    return Update(packed(found.trained), photos, result.final_loss, words)
