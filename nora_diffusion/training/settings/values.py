"""Converts flag and YAML values to the declared type of a setting, and suggests corrections."""

from __future__ import annotations

import difflib
import sys
import typing
from collections.abc import Iterable, Sequence
from decimal import Decimal
from types import NoneType, UnionType
from typing import Any, Literal

from ...errors import UserError

OTHER_NAMES = {
    "train_data_dir": "instance_data_dir", "dataset_name": "instance_data_dir", "image_dir": "instance_data_dir",
    "reg_data_dir": "class_data_dir", "conditioning_data_dir": "background_loss_weight",
    "alpha_mask": "background_loss_weight", "masked_loss": "background_loss_weight", "network_dim": "rank",
    "network_alpha": "alpha", "lora_alpha": "alpha", "network_module": "method", "network_train_unet_only": "placement",
    "unet_lr": "learning_rate", "lr_warmup": "lr_warmup_steps", "max_train_epochs": "num_train_epochs",
    "save_every_n_steps": "checkpointing_steps", "caption_extension": "use_captions", "enable_bucket": "aspect_buckets",
    "output_name": "output_dir", "flip_aug": "random_flip", "shuffle_caption": "shuffle_tags",
    "min_snr_gamma": "snr_gamma", "save_precision": "save_dtype",
}  # fmt: skip
"""Names that other trainers give to our settings: kohya's scripts, diffusers' text-to-image script."""
_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")


def suggestion(name: str, known: Iterable[str]) -> str:
    """``": did you mean 'x'?"`` with the closest known names, or a hint to see --help."""
    matches = close_matches(name, known)
    return f": did you mean {' or '.join(map(repr, matches))}?" if matches else ": see --help for all settings"


def unknown_argument(words: Sequence[str], known: Iterable[str], command: str) -> UserError:
    """The error for unrecognized arguments; ``known`` are the names of all flags."""
    word = next((word for word in words if word.startswith("--")), words[0])
    if not word.startswith("-"):
        hint = "quote a value that has spaces"
    elif matches := close_matches(word.lstrip("-").split("=")[0], known):
        return UserError(f"unknown flag {word!r}: did you mean {' or '.join('--' + name for name in matches)}?")
    else:
        hint = "no flag has a similar name"
    kind = "flag" if word.startswith("-") else "argument"
    return UserError(f"unknown {kind} {word!r}: {hint}; see {command} --help")


def close_matches(name: str, known: Iterable[str]) -> list[str]:
    """The name of another trainer's flag here, the closest spelling, or up to three names that contain ``name`` as a
    word or have it as initials."""
    names = list(known)
    if OTHER_NAMES.get(name) in names:
        return [OTHER_NAMES[name]]
    if close := difflib.get_close_matches(name, names, n=1, cutoff=0.65):
        return close
    words = [(other, other.split("_")) for other in names]
    return [other for other, own in words if name in own or name == "".join(word[:1] for word in own)][:3]


def coerce(name: str, value: Any, annotation: str, owner: type, allowed: tuple[str, ...] = ()) -> Any:
    """Convert ``value`` to the type of ``annotation``, or check it against ``allowed``. Raises :class:`UserError`."""
    choices, optional = _split(Literal[allowed] if allowed else _resolve(annotation, owner))
    if value is None or (optional and value == ""):
        if optional:
            return None
        raise UserError(f"{name} needs a value: give one, or leave it out for the default")
    for kind in choices:
        converted = _convert(value, kind)
        if converted is not None:
            return converted
    raise UserError(f"{name}={value!r} is not valid: {_expected(choices, value)}")


def _resolve(annotation: str, owner: type) -> Any:
    return eval(annotation, vars(sys.modules[owner.__module__]))  # annotations from our source code, never user input


def _split(hint: Any) -> tuple[list[Any], bool]:
    kinds = (
        list(typing.get_args(hint))
        if isinstance(hint, UnionType) or typing.get_origin(hint) is typing.Union
        else [hint]
    )
    return [kind for kind in kinds if kind is not NoneType], NoneType in kinds


def _convert(value: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is Literal:
        return value if value in typing.get_args(kind) else None
    if typing.get_origin(kind) is list:
        items = value if isinstance(value, list) else [value]
        return items if items and all(isinstance(item, str) for item in items) else None
    if kind is bool:
        return _boolean(value)
    if kind is str:
        return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
    return _number(value, kind)


def _boolean(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    return True if text in _TRUE else False if text in _FALSE else None


def _number(value: Any, kind: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        if kind is float:
            return float(value)
        number = Decimal(str(value))  # exact for long integers, and reads 1e3
    except (ValueError, ArithmeticError):
        return None
    return int(number) if number.is_finite() and -(2**63) <= number < 2**64 and number == int(number) else None


def _expected(choices: list[Any], value: Any) -> str:
    kind = choices[0]
    if typing.get_origin(kind) is Literal:
        allowed = [str(choice) for choice in typing.get_args(kind)]
        return f"choose one of {', '.join(allowed)}{suggestion(str(value), allowed)}"
    words = {
        bool: "give true or false",
        int: "give a whole number of at most 64 bits",
        float: "give a number",
        str: "give text",
    }
    return words.get(kind, "give one or more strings")
