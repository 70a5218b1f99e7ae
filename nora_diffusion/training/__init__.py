"""DreamBooth training of adapters: ``train(TrainConfig(...))`` or the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .command import main
    from .many.subjects import train_subjects
    from .run.train import TrainResult, check, check_on, train
    from .settings.config import TrainConfig

__all__ = ["TrainConfig", "TrainResult", "check", "check_on", "main", "train", "train_subjects"]
_MODULES = {
    "TrainConfig": "settings.config", "TrainResult": "run.train", "check": "run.train", "check_on": "run.train",
    "main": "command", "train": "run.train", "train_subjects": "many.subjects",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # Import torch and diffusers only when a run starts, so that --help and flag errors are fast.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
