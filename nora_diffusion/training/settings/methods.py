"""Which settings each method takes: read off the parameters of its preset."""

from __future__ import annotations

from functools import cache
from typing import Any

from ...adapters.presets import PRESETS, TRAINER_RANKS, options
from .config import settings

RENAMED = {"rank": "r", "inner_rank": "inner_r"}
"""Settings with another name than the preset's parameter; diffusers' scripts say ``rank``."""


@cache
def parameters_of(method: str) -> dict[str, str]:
    """The settings that a method takes, each with the name of its preset's parameter."""
    pairs = ((f.name, RENAMED.get(f.name, f.name)) for f in settings() if f.metadata["group"] == "adapter")
    return {name: parameter for name, parameter in pairs if parameter in options(method)}


def owners_of(setting: str) -> list[str]:
    """The methods that take a setting; empty for a setting that is no preset's."""
    return [method for method in PRESETS if setting in parameters_of(method)]


def method_defaults(method: str) -> dict[str, Any]:
    """The preset's own defaults by setting, with the rank that the trainer takes."""
    values = {name: options(method)[parameter] for name, parameter in parameters_of(method).items()}
    values["rank"] = TRAINER_RANKS.get(method, values["rank"])
    return {name: value for name, value in values.items() if value is not None}
