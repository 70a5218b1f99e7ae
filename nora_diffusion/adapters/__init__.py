"""Adapters: the maths (bases, cores, deltas) and the one PEFT tuner that carries them."""

from .config import AdapterConfig
from .layer import NoraLayer
from .presets import PRESETS, dora, dylora, lora, lora_mini, lora_xs, melora, moe_lora, mor, mora, nora
from .register import register
from .targets import TARGET_GROUPS, in_blocks

register()

__all__ = [
    "PRESETS", "TARGET_GROUPS", "AdapterConfig", "NoraLayer", "dora", "dylora", "in_blocks", "lora", "lora_mini",
    "lora_xs", "melora", "moe_lora", "mor", "mora", "nora",
]  # fmt: skip
