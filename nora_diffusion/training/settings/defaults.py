"""Defaults that depend on the base and the method: the one place where they are tuned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...adapters.presets import freezes_outer, is_routed
from ...pipelines.base import EMBEDDED_GUIDANCE, EMBEDDED_STEPS, OTHER_GUIDANCE, OTHER_STEPS, is_embedded
from .config import TrainConfig
from .methods import method_defaults, parameters_of

EMBEDDED: dict[str, Any] = {
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
"""The embedded base is small: it learns a subject in about a minute on a CPU."""
EMBEDDED_FROZEN: dict[str, Any] = {"learning_rate": 1.2e-3, "inner_rank": 16}
"""On the embedded base, methods with a frozen outer factor learn best at twice LoRA's rate (docs/comparing.md)."""

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
"""Other bases: as diffusers' script, except for the steps (its one epoch over five images is two steps) and the warm-up
(its 500 steps would fill the run; here it is a tenth of the steps)."""

USUAL_TEXT_RATES = (1e-6, 5e-3)
USUAL_TOKEN_RATES = (1e-5, 5e-2)
USUAL_FACTORS = (0.1, 10.0)
"""The usual range of Prodigy's learning rate, which multiplies the rate that it estimates."""
TOKEN_RATE = 1e-3


def usual_rates(method: str) -> tuple[float, float]:
    """Learning rates of AdamW outside of which a run is most likely a mistake, such as full fine-tuning's 5e-6."""
    return (5e-5, 1e-2) if freezes_outer(method) else (2e-5, 5e-3)


def embedded_defaults(method: str) -> dict[str, Any]:
    """The defaults of the embedded base for a method."""
    return {**EMBEDDED, **(EMBEDDED_FROZEN if freezes_outer(method) else {})}


def with_defaults(config: TrainConfig) -> TrainConfig:
    """``config`` with a value for every ``None`` that has a default here. What the user set is never changed."""
    method = config.method
    base = embedded_defaults(method) if is_embedded(config.pretrained_model_name_or_path) else dict(OTHER)
    if is_routed(method) and config.router in (None, "token"):  # a token router cannot gate a convolution
        base["target_modules"] = [group for group in base["target_modules"] if group != "conv"]
    table = {**method_defaults(method), **base}
    if config.num_train_epochs is not None:  # the number of steps follows from the number of images
        del table["max_train_steps"]
    if config.optimizer == "prodigy":
        table["learning_rate"] = 1.0  # a factor of the rate that it estimates, the same for all parameters
    elif config.train_text_encoder_ti:
        table["token_lr"] = TOKEN_RATE
    if config.optimizer == "schedulefree":
        table["lr_scheduler"] = "constant"
    if config.loss_weighting not in (None, "min_snr"):
        table["snr_gamma"] = 0.0
    if "inner_rank" not in parameters_of(method):
        table.pop("inner_rank", None)
    filled = replace(config, **{name: value for name, value in table.items() if getattr(config, name) is None})
    if config.inner_rank is None and filled.inner_rank is not None and filled.rank is not None:
        filled.inner_rank = min(filled.inner_rank, filled.rank)
    if filled.loss_weighting is None:
        filled.loss_weighting = "min_snr" if filled.snr_gamma else "none"
    return filled
