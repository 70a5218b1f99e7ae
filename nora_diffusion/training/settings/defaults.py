"""Defaults that depend on the base and the method: the one place where they are tuned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...pipelines.base import EMBEDDED_GUIDANCE, EMBEDDED_STEPS, OTHER_GUIDANCE, OTHER_STEPS, is_embedded
from .config import TrainConfig

# The embedded base is small and its subjects are learned in about a minute on a CPU.
EMBEDDED: dict[str, Any] = {
    "rank": 32,
    "inner_rank": 16,
    "target_modules": ["attn", "ff", "proj", "conv"],
    "learning_rate": 6e-4,
    "max_train_steps": 300,
    "train_batch_size": 4,
    "lr_scheduler": "cosine",
    "snr_gamma": 5.0,
    "timestep_sampling": "stratified",
    "sample_steps": EMBEDDED_STEPS,
    "sample_guidance": EMBEDDED_GUIDANCE,
}

FROZEN_OUTER_RATE = 1.2e-3
"""Of methods with a frozen outer pair on the embedded base, which learn best at twice LoRA's (docs/comparing.md)."""

# Other bases: as diffusers' script, but for the steps (its one epoch over five photos is two) and the warm-up (its 500
# would fill the whole run): that is a tenth of the steps everywhere.
OTHER: dict[str, Any] = {
    "target_modules": ["attn"],
    "learning_rate": 5e-4,
    "max_train_steps": 500,
    "train_batch_size": 4,
    "lr_scheduler": "constant",
    "snr_gamma": 0.0,
    "sample_steps": OTHER_STEPS,
    "sample_guidance": OTHER_GUIDANCE,
}

METHODS: dict[str, dict[str, Any]] = {
    "nora": {"rank": 32, "inner_rank": 4, "basis": "awsvd"},
    "mor": {"rank": 8, "num_experts": 8},
    "moe_lora": {"rank": 4, "num_experts": 8},
    "lora": {"rank": 4},
    "lora_xs": {"rank": 32, "basis": "svd"},
    "lora_mini": {"rank": 32, "inner_rank": 4, "basis": "kaiming"},
    "dora": {"rank": 4},
    "mora": {"rank": 4},
    "melora": {"rank": 16, "blocks": 4},
    "dylora": {"rank": 8},
}

FROZEN_OUTER = (5e-5, 1e-2)
USUAL_RATES: dict[str, tuple[float, float]] = {
    "nora": FROZEN_OUTER, "lora_xs": FROZEN_OUTER, "lora_mini": FROZEN_OUTER, "mora": FROZEN_OUTER,
    **dict.fromkeys(("mor", "moe_lora", "lora", "dora", "melora", "dylora"), (2e-5, 5e-3)),
}  # fmt: skip
USUAL_TEXT_RATES = (1e-6, 5e-3)
USUAL_TOKEN_RATES = (1e-5, 5e-2)
"""Learning rates of AdamW beyond which a run is most likely a mistake, such as full fine-tuning's 5e-6."""
USUAL_FACTORS = (0.1, 10.0)
"""The same of Prodigy's, which multiplies the rate that it finds."""
TOKEN_RATE = 1e-3

# What each method has beside a rank; a setting of another method is a mistake worth a sentence.
METHOD_KEYS: dict[str, tuple[str, ...]] = {
    "nora": ("inner_rank", "basis", "placement", "power", "core", "magnitude"),
    "mor": ("num_experts", "router"),
    "moe_lora": ("num_experts", "router"),
    "lora": ("magnitude",),
    "lora_xs": ("basis", "placement", "magnitude"),
    "lora_mini": ("inner_rank", "basis", "magnitude"),
    "dora": (),
    "mora": ("magnitude",),
    "melora": ("blocks", "magnitude"),
    "dylora": ("magnitude",),
}
# Those settings by the names of the presets' parameters.
PRESET_KEYS = {
    "inner_rank": "inner_r", "basis": "basis", "placement": "placement", "power": "power", "core": "core",
    "num_experts": "num_experts", "router": "router", "blocks": "blocks", "magnitude": "magnitude",
}  # fmt: skip


def embedded(method: str) -> dict[str, Any]:
    """The defaults of the embedded base for a method."""
    own = {"learning_rate": FROZEN_OUTER_RATE} if USUAL_RATES[method] is FROZEN_OUTER else {}
    return {**EMBEDDED, **own}


def with_defaults(config: TrainConfig) -> TrainConfig:
    """``config`` with every ``None`` that has a default filled in. What the user gave is never changed."""
    base = embedded(config.method) if is_embedded(config.pretrained_model_name_or_path) else dict(OTHER)
    if config.method != "nora":
        base.pop("rank", None)
    if "router" in METHOD_KEYS[config.method] and config.router in (None, "token"):  # which cannot gate a convolution
        base["target_modules"] = [group for group in base["target_modules"] if group != "conv"]
    table = {**METHODS[config.method], **base}
    # Epochs given without steps: the number of steps follows from the number of photos.
    skip = {"max_train_steps"} if config.num_train_epochs is not None else set()
    if config.optimizer == "prodigy":
        table["learning_rate"] = 1.0  # a factor of the rate that it finds, the same for all that is trained
    elif config.train_text_encoder_ti:
        table["token_lr"] = TOKEN_RATE
    if config.optimizer == "schedulefree":
        table["lr_scheduler"] = "constant"
    if config.loss_weighting not in (None, "min_snr"):
        table["snr_gamma"] = 0.0
    foreign = PRESET_KEYS.keys() - set(METHOD_KEYS[config.method])
    missing = {k: v for k, v in table.items() if getattr(config, k) is None and k not in skip | foreign}
    if "inner_rank" in missing:
        missing["inner_rank"] = min(missing["inner_rank"], config.rank or missing["rank"])
    return replace(config, **missing)
