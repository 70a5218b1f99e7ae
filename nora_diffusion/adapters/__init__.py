"""Adapters: the maths (bases, cores, deltas) and the one PEFT tuner that carries them."""

from .config import AdapterConfig
from .presets import PRESETS, dora, dylora, lora, lora_mini, lora_xs, melora, moe_lora, mor, mora, nora
from .targets import TARGET_GROUPS, in_blocks
from .tuner.layer import NoraLayer
from .tuner.register import register

register()

__all__ = [
    "PRESETS", "TARGET_GROUPS", "AdapterConfig", "NoraLayer", "dora", "dylora", "in_blocks", "lora", "lora_mini",
    "lora_xs", "melora", "moe_lora", "mor", "mora", "nora",
]  # fmt: skip
