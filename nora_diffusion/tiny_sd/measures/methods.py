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
    "lora_r2": {"method": "lora", "rank": 2},  # a fifth more trained parameters than NoRA
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
    "milora": {"method": "milora"},  # one gate for the modules of a transformer block: no convolutions
    "chain": {"method": "lora", "rank": 8, "strategy": "chain"},  # two links of rank 8: a file of rank 16
    "reslora": {"method": "lora", "rank": 8, "strategy": "reslora"},  # block shortcut: a file of up to rank 16
    "flat_lora": {"method": "lora", "rank": 8, "strategy": "flat"},
    "halora": {"method": "lora", "rank": 8, "strategy": "halora"},
    "lora_pro": {"method": "lora", "rank": 8, "optimizer": "lora_pro"},
    "lora_rite": {"method": "lora", "rank": 8, "optimizer": "lora_rite"},
    "adalora": {"method": "lora", "rank": 8, "rank_allocation": "adalora"},  # LoRA whose ranks move while it trains
    "dynamic_dora": {"method": "lora", "rank": 8, "rank_allocation": "dynamic_dora"},
    "alora": {"method": "lora", "rank": 8, "rank_allocation": "alora"},
    "prilora": {"method": "lora", "rank": 8, "rank_allocation": "prilora"},
    "heterolora": {"method": "lora", "rank": 8, "rank_allocation": "heterolora"},
    "heterolora_once": {"method": "lora", "rank": 8, "rank_allocation": "heterolora_once"},
    "beamlora": {"method": "lora", "rank": 8, "rank_allocation": "beamlora"},
}
PEERS: dict[str, dict[str, int]] = {  # methods that are not ours, with their settings: :mod:`.peers` trains them
    "full": {},  # full fine-tuning of the layers that the others adapt
    "lokr": {"rank": 8},
    "oft": {"block_size": 32},  # PEFT's default; divides the inputs of all layers of this base
}
TASKS_OWN = ("learning_rate", "seed", "max_train_steps", "mixed_precision")


def is_trained(method: str) -> bool:
    """Whether a method is trained: all but ``base``."""
    return is_peer(method) or METHODS[_name(method)] is not None


def is_peer(method: str) -> bool:
    """Whether a method is not ours, but one of :data:`PEERS`."""
    return _name(method) in PEERS


def _name(method: str) -> str:
    return method.partition(":")[0]


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

    ``name``: a key of :data:`METHODS`, with settings of ``nora-diffusion train`` (several targets are joined by ``+``),
    or of :data:`PEERS`, with its own. Empty for ``base``. Raises :class:`UserError` for unknown names and settings, and
    for those that a comparison varies itself.
    """
    from ...training.settings.config import TrainConfig
    from ...training.settings.defaults import with_defaults

    name, _, text = method.partition(":")
    if name not in METHODS and name not in PEERS:
        raise UserError(f"the method {name!r} is unknown: choose among {', '.join((*METHODS, *PEERS))}")
    given = _pairs(method, text)
    if name in PEERS:
        return _peer_settings(method, given)
    own = METHODS[name]
    if own is None:
        if given:
            raise UserError(f"{method!r}: the base is not trained, so it has no settings")
        return {}
    config = TrainConfig.from_mapping({**own, **given})
    filled = with_defaults(replace(config, pretrained_model_name_or_path=None))
    defaults = TrainConfig()
    values = {field.name: getattr(filled, field.name) for field in fields(filled)}
    return {"method": filled.method} | {key: v for key, v in values.items() if v != getattr(defaults, key)}


def training_settings(method: str) -> dict[str, Any]:
    """:func:`method_settings` as the trainer takes them: a peer has LoRA's layers, data, noise and optimizer."""
    return method_settings("lora" if is_peer(method) else method)


def peers_own(method: str) -> dict[str, int]:
    """The settings of a peer that the trainer does not have, such as its rank."""
    return {key: value for key, value in method_settings(method).items() if key in PEERS[_name(method)]}


def _peer_settings(method: str, given: dict[str, Any]) -> dict[str, Any]:
    name = _name(method)
    known = PEERS[name]
    if unknown := [key for key in given if key not in known]:
        raise UserError(f"{method!r}: {name} takes {', '.join(known) or 'no settings'}, not {unknown[0]}")
    if wrong := [f"{key}={value}" for key, value in given.items() if not value.isdecimal() or int(value) < 1]:
        raise UserError(f"{method!r}: {wrong[0]} is not a whole number of at least 1")
    shared = {key: value for key, value in training_settings(method).items() if key != "rank"}
    return {**shared, "method": name, **known, **{key: int(value) for key, value in given.items()}}


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
