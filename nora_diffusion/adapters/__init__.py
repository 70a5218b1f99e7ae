"""Adapters: the maths (:mod:`.deltas`) and the one PEFT tuner that carries every method (:mod:`.tuner`).

Presets can be listed without torch; it is imported when the first config is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .presets import (
    PRESETS,
    dora,
    dylora,
    lora,
    lora_mini,
    lora_xs,
    malora,
    melora,
    milora,
    moe_lora,
    mor,
    mora,
    nora,
    nora_input,
)
from .targets import TARGET_GROUPS, in_blocks

if TYPE_CHECKING:
    from .config import AdapterConfig
    from .tuner.layer import NoraLayer

__all__ = [
    "PRESETS", "TARGET_GROUPS", "AdapterConfig", "NoraLayer", "dora", "dylora", "in_blocks", "lora", "lora_mini",
    "lora_xs", "malora", "melora", "milora", "moe_lora", "mor", "mora", "nora", "nora_input",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "AdapterConfig":
        from . import tuner  # noqa: F401 (registers the tuner that the config names)
        from .config import AdapterConfig

        return AdapterConfig
    if name == "NoraLayer":
        from .tuner.layer import NoraLayer

        return NoraLayer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
