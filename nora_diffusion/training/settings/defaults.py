"""Defaults that depend on the base and the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

from ...adapters.presets import default_axes, is_routed, options
from ...pipelines.base import EMBEDDED_GUIDANCE, EMBEDDED_STEPS, OTHER_GUIDANCE, OTHER_STEPS, is_embedded
from .config import TrainConfig
from .methods import method_defaults
from .rank_allocations import rate_factor
from .strategies import OWN

EMBEDDED: dict[str, Any] = {
    "target_modules": ["attn", "ff", "proj", "conv"],
    "learning_rate": 4.8e-3,
    "max_train_steps": 100,
    "train_batch_size": 4,
    "lr_scheduler": "cosine",
    "snr_gamma": 5.0,
    "timestep_sampling": "stratified",
    "sample_steps": EMBEDDED_STEPS,
    "sample_guidance": EMBEDDED_GUIDANCE,
}
"""Defaults for the embedded base: training takes half a minute on a CPU. The rates of all methods were measured with
these steps (docs/benchmark.md)."""
JOINT_STEPS = 300
"""Steps of several subjects that share one adapter."""


class Tuned(NamedTuple):
    """What is tuned for a method: changes of :data:`EMBEDDED`, and the usual range of AdamW's rate on other bases.

    ``anywhere``: its settings on every base.
    """

    embedded: Mapping[str, Any] = MappingProxyType({})
    usual_rates: tuple[float, float] = (2e-5, 5e-3)
    anywhere: Mapping[str, Any] = MappingProxyType({})


FROZEN_RATES = (5e-5, 1e-2)
"""Frozen outer factors train best at LoRA's rate or up to four times of it."""
EMBEDDED_RATES = 4
"""The embedded base trains at rates so many times as high as those of other bases."""
BALANCED = MappingProxyType({"balance_loss_weight": 0.01})
"""The weight of the Switch Transformer."""
TUNED: dict[str, Tuned] = {
    "nora": Tuned({"learning_rate": 9.6e-3, "inner_rank": 16}, FROZEN_RATES),
    "nora_input": Tuned({"learning_rate": 9.6e-3}, FROZEN_RATES),
    "lora_xs": Tuned({}, FROZEN_RATES),
    "lora_mini": Tuned({"learning_rate": 1.92e-2, "inner_rank": 16}, FROZEN_RATES),
    "mora": Tuned({"learning_rate": 2.4e-3}, FROZEN_RATES),
    "melora": Tuned({"learning_rate": 9.6e-3}),
    "mor": Tuned({"learning_rate": 9.6e-3}),
    "malora": Tuned({"learning_rate": 9.6e-3}, anywhere=BALANCED),
    "milora": Tuned(
        {"learning_rate": 9.6e-3, "target_modules": ["attn", "ff"]},
        anywhere={**BALANCED, "target_modules": ["attn", "ff"]},
    ),
}
"""By method; all others have the defaults of :class:`Tuned`."""

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
"""Defaults for other bases: those of diffusers' script, except for the number of steps (its one epoch over five images
is only two steps) and the warmup (a tenth of the steps, since its 500 steps would be the whole run)."""

USUAL_TEXT_RATES = (1e-6, 5e-3)
USUAL_TOKEN_RATES = (1e-5, 5e-2)
USUAL_FACTORS = (0.1, 10.0)
"""Usual range of Prodigy's learning rate, a factor of the rate that it estimates."""
TOKEN_RATE = 1e-3


def usual_rates(method: str, embedded: bool = False) -> tuple[float, float]:
    """Usual range of AdamW's learning rate; a rate outside it is likely a mistake (5e-6 is for full fine-tuning)."""
    low, high = TUNED.get(method, Tuned()).usual_rates
    return low, high * (EMBEDDED_RATES if embedded else 1)


def embedded_defaults(method: str, joint: bool = False) -> dict[str, Any]:
    """Defaults for ``method`` on the embedded base; ``joint``: several subjects share the steps of one adapter."""
    values = {**EMBEDDED, **TUNED.get(method, Tuned()).embedded}
    return values | ({"max_train_steps": JOINT_STEPS} if joint else {})


def lora_pro_rate(config: TrainConfig) -> float:
    """LoRA-Pro's rate in units of AdamW's. That of ``full`` moments is a rate of the product, not of the factors:
    of ``dW``, or of the small matrix between frozen outer factors."""
    if config.lora_pro_moments == "factors":
        return 2.0
    return 0.5 if default_axes(config.method).core in ("nested", "input") else 0.25


def with_defaults(config: TrainConfig) -> TrainConfig:
    """Fill in the settings that are ``None`` and have a default here."""
    method = config.method
    embedded = is_embedded(config.pretrained_model_name_or_path)
    base = embedded_defaults(method, config.joint) if embedded else dict(OTHER)
    if is_routed(method) and (config.router or options(method)["router"]) == "token":  # cannot gate a convolution
        base["target_modules"] = [group for group in base["target_modules"] if group != "conv"]
    own = {**TUNED.get(method, Tuned()).anywhere, **OWN.get(config.strategy, {})}
    values = {**method_defaults(method), **base, **own}
    if config.num_train_epochs is not None:  # the number of images determines the number of steps
        del values["max_train_steps"]
    values["learning_rate"] *= rate_factor(config)
    if config.optimizer == "lora_pro":
        values["learning_rate"] *= lora_pro_rate(config)
    if config.optimizer == "prodigy":
        values["learning_rate"] = 1.0  # a factor of its estimated rate, for all parameters
    elif config.train_text_encoder_ti:
        values["token_lr"] = TOKEN_RATE
    if config.optimizer == "schedulefree":
        values["lr_scheduler"] = "constant"
    if config.loss_weighting not in (None, "min_snr"):
        values["snr_gamma"] = 0.0
    filled = replace(config, **{name: value for name, value in values.items() if getattr(config, name) is None})
    if config.inner_rank is None and filled.inner_rank is not None and filled.rank is not None:
        filled.inner_rank = min(filled.inner_rank, filled.rank)
    if filled.loss_weighting is None:
        filled.loss_weighting = "min_snr" if filled.snr_gamma else "none"
    return filled
