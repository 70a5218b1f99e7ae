"""What the trainer's tests share: the type of their config fixture and command lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nora_diffusion.training import TrainConfig
from nora_diffusion.training.many import subjects
from nora_diffusion.training.run import setup

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


def in_double(replace: Callable[[Any, str, Any], None]) -> None:
    """Have the trainer work in fp64: frozen weights, factors and activations. ``replace`` is as ``setattr``."""
    original = setup.place_adapter

    def place_adapter(config: TrainConfig, pipe: Any, *rest: Any) -> Any:
        parameters = original(config, pipe, *rest)
        torch.nn.Module.to(pipe.unet, torch.float64)
        torch.nn.Module.to(pipe.text_encoder, torch.float64)
        return parameters

    def lower_precision(config: TrainConfig, pipe: Any, device: torch.device) -> torch.dtype:
        for module in (pipe.unet, pipe.text_encoder):
            torch.nn.Module.to(module, torch.float64)
        if config.gradient_checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        return torch.float64

    replace(setup, "place_adapter", place_adapter)
    replace(setup, "lower_precision", lower_precision)
    replace(subjects, "lower_precision", lower_precision)


def factors(folder: Path) -> dict[str, torch.Tensor]:
    """What was trained, in the precision it was trained in: weights and moments."""
    last = max(folder.glob("checkpoints/step-*"), key=lambda path: int(path.name[5:]))
    tensors = load_file(last / "nora_adapter.safetensors") | load_file(last / "optimizer.safetensors")
    return {key: value.double() for key, value in tensors.items() if not key.endswith("_out")}


def distance(one: Path, other: Path) -> float:
    """The relative distance of two runs' trained numbers."""
    first, second = factors(one), factors(other)
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).norm() / second[key].norm().clamp(min=1e-300)) for key in first)
