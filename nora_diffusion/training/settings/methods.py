"""Settings of each method, derived from the parameters of its preset."""

from __future__ import annotations

from functools import cache
from typing import Any

from ...adapters.presets import PRESETS, TRAINER_RANKS, options
from .config import settings

PARAMETER_NAMES = {"rank": "r", "inner_rank": "inner_r"}
"""Settings whose preset parameter has another name. ``rank`` is the name in diffusers' scripts."""


@cache
def parameters_of(method: str) -> dict[str, str]:
    """Preset parameter of each setting that ``method`` has."""
    pairs = ((f.name, PARAMETER_NAMES.get(f.name, f.name)) for f in settings() if f.metadata["group"] == "adapter")
    return {name: parameter for name, parameter in pairs if parameter in options(method)}


def owners_of(setting: str) -> list[str]:
    """Methods that have ``setting``; empty if it is not a setting of any preset."""
    return [method for method in PRESETS if setting in parameters_of(method)]


def method_defaults(method: str) -> dict[str, Any]:
    """Defaults of the preset by setting, with the trainer's default rank."""
    values = {name: options(method)[parameter] for name, parameter in parameters_of(method).items()}
    values["rank"] = TRAINER_RANKS.get(method, values["rank"])
    return {name: value for name, value in values.items() if value is not None}
