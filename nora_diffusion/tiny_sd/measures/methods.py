"""The methods that are compared: named shortcuts, and settings given in text."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from ...errors import UserError

METHODS: dict[str, dict[str, Any] | None] = {  # training settings on top of the embedded base's defaults
    "base": None,  # the control, not trained: what the class word alone achieves
    "lora": {"method": "lora", "rank": 8},
    "nora": {"method": "nora"},
    "nora_input": {"method": "nora_input"},  # a little smaller than NoRA
    "lora_r1": {"method": "lora", "rank": 1},
    "lora_r2": {"method": "lora", "rank": 2},  # about as many trained parameters as NoRA
    "lora_r4": {"method": "lora", "rank": 4},
    "lora_xs": {"method": "lora_xs", "rank": 32},  # as many as NoRA: dense core, plain SVD
    "lora_mini": {"method": "lora_mini"},  # as many as NoRA: its chain in random subspaces
    "dora": {"method": "dora", "rank": 8},
    "mora": {"method": "mora"},
    "melora": {"method": "melora"},
    "dylora": {"method": "dylora", "rank": 8},
    "mor": {"method": "mor"},  # mixtures with a token router leave out the convolutions
    "moe_lora": {"method": "moe_lora"},
    "malora": {"method": "malora"},
}
TASKS_OWN = ("learning_rate", "seed", "max_train_steps", "mixed_precision")


def is_trained(method: str) -> bool:
    """Whether a method trains an adapter: all but ``base``."""
    return METHODS[method.split(":")[0]] is not None


def split_rate(text: str) -> tuple[str, float | None]:
    """``("lora:rank=4", 4.8e-3)`` of "lora:rank=4@4.8e-3"; the rate is ``None`` if it is not given.

    Raises :class:`UserError` for what is no rate.
    """
    method, at, rate = text.partition("@")
    if not at:
        return method, None
    try:
        if (value := float(rate)) > 0:
            return method, value
    except ValueError:
        pass
    raise UserError(f"{text!r}: write a learning rate behind @, for example lora@4.8e-3")


def method_settings(method: str) -> dict[str, Any]:
    """The training settings of ``name`` or ``name:setting=value,setting=value``, with the embedded base's defaults.

    ``name``: a key of :data:`METHODS`; ``setting``: one of ``nora-diffusion train``; several targets are joined by
    ``+``. Empty for ``base``. Raises :class:`UserError` for unknown names and settings, and for those that a comparison
    varies itself.
    """
    from ...training.settings.config import TrainConfig
    from ...training.settings.defaults import with_defaults

    name, _, text = method.partition(":")
    if name not in METHODS:
        raise UserError(f"the method {name!r} is unknown: choose among {', '.join(METHODS)}")
    own, given = METHODS[name], _pairs(method, text)
    if own is None:
        if given:
            raise UserError(f"{method!r}: the base is not trained, so it has no settings")
        return {}
    config = TrainConfig.from_mapping({**own, **given})
    filled = with_defaults(replace(config, pretrained_model_name_or_path=None))
    defaults = TrainConfig()
    values = {field.name: getattr(filled, field.name) for field in fields(filled)}
    return {"method": filled.method} | {key: v for key, v in values.items() if v != getattr(defaults, key)}


def _pairs(method: str, text: str) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not value:
            raise UserError(f"{method!r}: write a setting as name=value, for example nora:rank=32,inner_rank=8")
        if key in TASKS_OWN:
            raise UserError(f"{method!r}: {key} is the same for all methods: use --rates, --seeds or --{key}")
        pairs[key] = value.split("+") if key == "target_modules" else value
    return pairs
