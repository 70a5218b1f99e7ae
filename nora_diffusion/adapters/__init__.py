"""Adapters: the maths (bases, cores, deltas) and the one PEFT tuner that carries them."""

from .config import TARGET_GROUPS, AdapterConfig
from .layer import NoraLayer
from .presets import PRESETS, lora, lora_xs, mor, nora
from .register import register

register()

__all__ = ["PRESETS", "TARGET_GROUPS", "AdapterConfig", "NoraLayer", "lora", "lora_xs", "mor", "nora"]
