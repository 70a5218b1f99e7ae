"""Helpers of the trainer's tests: config fixture type, command lines, comparisons of runs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nora_diffusion.training import TrainConfig
from nora_diffusion.training.many import subjects
from nora_diffusion.training.planning.plan import Plan
from nora_diffusion.training.run import run
from nora_diffusion.training.run.updates import Updates
from nora_diffusion.training.settings.defaults import with_defaults
from nora_diffusion.training.settings.resolved import ResolvedConfig, resolved

Configure = Callable[..., TrainConfig]


def resolve(config: TrainConfig) -> ResolvedConfig:
    """``config`` with defaults, and small values for settings that depend on base or machine."""
    filled = with_defaults(config)
    values = {
        "seed": 0,
        "mixed_precision": "no",
        "lr_warmup_steps": 0,
        "resolution": 16,
        "timestep_sampling": "uniform",
    }
    return resolved(filled, **{name: v for name, v in values.items() if getattr(filled, name) is None})


def flags(config: TrainConfig) -> list[str]:
    """``config`` as a command line."""
    words: list[str] = []
    for name, value in config.to_dict(secrets=True).items():
        if value is not None:
            words += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    return words


def journal(folder: Path) -> list[tuple[Any, ...]]:
    """Step, loss, learning rate and gradient norm of each line in ``log.jsonl``."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["lr"], row["grad_norm"]) for row in rows]


def assert_equal_tensors(one: Path, other: Path) -> None:
    """Compare tensor by tensor, since safetensors orders its metadata at random."""
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def assert_same_run(one: Path, other: Path, last: int) -> None:
    assert journal(one) == journal(other)
    for name in ("nora_adapter.safetensors", f"checkpoints/step-{last}/optimizer.safetensors"):
        assert_equal_tensors(one / name, other / name)


def interrupt_after(step: int, monkeypatch: Any, number: int = signal.SIGTERM) -> None:
    """Send this process a signal in the middle of step ``step``, before its update."""
    original = Updates._update

    def update(self: Updates, done: int) -> Any:
        if done == step:
            os.kill(os.getpid(), number)
        return original(self, done)

    monkeypatch.setattr(Updates, "_update", update)


def in_double(replace: Callable[[Any, str, Any], None]) -> None:
    """Make the trainer use fp64 for frozen weights, factors and activations. ``replace`` works like ``setattr``."""

    def to_double(pipe: Any) -> None:
        for module in (pipe.unet, pipe.text_encoder):
            torch.nn.Module.to(module, torch.float64)

    def wrapped(original: Callable[..., Any], pipe_of: Callable[[Any], Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            parameters = original(*args)
            to_double(pipe_of(args))
            return parameters

        return call

    def prepare_base(plan: Plan) -> None:
        to_double(plan.pipe)
        if plan.config.gradient_checkpointing:
            plan.pipe.unet.enable_gradient_checkpointing()

    replace(run, "add_new_adapter", wrapped(run.add_new_adapter, lambda args: args[1]))
    replace(run, "load_checkpoint_adapter", wrapped(run.load_checkpoint_adapter, lambda args: args[0]))
    replace(run, "with_measured_ranks", wrapped(run.with_measured_ranks, lambda args: args[0].plan.pipe))
    replace(run, "prepare_base", prepare_base)
    replace(subjects, "prepare_base", prepare_base)
    replace(Plan, "dtype", torch.float64)


def factors(folder: Path) -> dict[str, torch.Tensor]:
    """Trained weights and optimizer moments of the last checkpoint, as fp64."""
    last = max(folder.glob("checkpoints/step-*"), key=lambda path: int(path.name[5:]))
    tensors = load_file(last / "nora_adapter.safetensors") | load_file(last / "optimizer.safetensors")
    return {key: value.double() for key, value in tensors.items() if not key.endswith("_out")}


def distance(one: Path, other: Path) -> float:
    """Largest relative distance between tensors of two runs."""
    first, second = factors(one), factors(other)
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).norm() / second[key].norm().clamp(min=1e-300)) for key in first)
