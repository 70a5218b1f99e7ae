"""What the trainer's tests share: the type of their config fixture and command lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nora_diffusion.training import TrainConfig

Configure = Callable[..., TrainConfig]


def flags(config: TrainConfig) -> list[str]:
    """The command line that means ``config``."""
    words: list[str] = []
    for name, value in config.to_dict(secrets=True).items():
        if value is not None:
            words += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    return words


def journal(folder: Path) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["lr"], row["grad_norm"]) for row in rows]


def assert_equal_tensors(one: Path, other: Path) -> None:
    """By tensor: safetensors orders its metadata at random."""
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def assert_same_run(one: Path, other: Path, last: int) -> None:
    assert journal(one) == journal(other)
    for name in ("nora_adapter.safetensors", f"checkpoints/step-{last}/optimizer.safetensors"):
        assert_equal_tensors(one / name, other / name)
