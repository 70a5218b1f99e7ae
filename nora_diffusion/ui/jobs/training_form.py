"""What the Train tab asks for: a preset's settings with what was changed, and what the trainer says of them."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError, first_line
from ..engine import Engine
from ..messages import without_dashes
from .jobs import copy_photos

MAX_YAML = 4000
WORD = re.compile(r"[^\s<>]{1,40}")
PRESETS: dict[str, tuple[float, float]] = {"Fast": (1 / 3, 1.0), "Balanced": (1.0, 1.0), "Best": (2.5, 0.7)}
"""Factors of the base's default steps and learning rate."""

OPEN_GROUPS = ("adapter", "prior", "training", "optimizer")


def build_settings(
    engine: Engine, preset: str, trigger: str, class_word: str, changes: Mapping[str, Any], extra: str = ""
) -> dict[str, Any]:
    """Settings of a run. ``changes`` and then the YAML lines of ``extra`` win over the preset.

    Raises :class:`UserError` for what the trainer refuses, and for settings that a page may not make.
    """
    for field, word, example in (("What it is", class_word, "dog"), ("Trigger word", trigger, "sks")):
        check_word(field, word.strip(), example)
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset[:40]!r}: choose one of {', '.join(PRESETS)}")
    trigger, class_word = trigger.strip(), class_word.strip()
    own = {k: v for k, v in changes.items() if v is not None and v != ""} | read_extra(extra)
    defaults = _defaults(engine, str(own.get("method", "nora")))
    steps = own.get("max_train_steps") or max(1, round(defaults.max_train_steps * PRESETS[preset][0]))
    every = max(1, int(steps) // 5)
    return {
        "pretrained_model_name_or_path": engine.source.base,
        **{name: value for name in ("variant", "revision") if (value := getattr(engine.source, name))},
        "instance_prompt": f"a {trigger} {class_word}",
        "trigger": trigger,
        "class_word": class_word,
        "max_train_steps": steps,
        "learning_rate": defaults.learning_rate * PRESETS[preset][1],
        "validation_prompt": f"a {trigger} {class_word} on the beach",
        "validation_steps": every,
        "num_validation_images": 2,
        "checkpointing_steps": every,
        "checkpoints_total_limit": 6,
        "seed": 0,
        **own,
    }


def check_word(field: str, word: str, example: str) -> None:
    """Raises :class:`UserError` for anything but one word; several are shown joined."""
    if not word:
        raise UserError(f"'{field}' is empty: give one word, for example {example}")
    if not WORD.fullmatch(word):
        joined = "-".join(re.sub("[<>]", " ", word).split())[:40] or example
        raise UserError(f"'{field}' is {word[:40]!r}: give one word, for example {joined}")


def _defaults(engine: Engine, method: str) -> Any:
    from ...training import TrainConfig
    from ...training.settings.defaults import with_defaults

    config = TrainConfig.from_mapping({"pretrained_model_name_or_path": engine.source.base, "method": method})
    return with_defaults(config)


def read_extra(text: str) -> dict[str, Any]:
    """Settings from lines ``key: value``. Raises :class:`UserError` for those that a page may not make."""
    import yaml

    if len(text or "") > MAX_YAML or any(mark in text for mark in ("&", "*")):
        raise UserError(f"the further settings are plain lines 'key: value', at most {MAX_YAML} characters")
    try:
        values = yaml.safe_load(text or "") or {}
    except yaml.YAMLError as error:
        raise UserError(f"the further settings are not 'key: value' lines: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError("the further settings must be lines 'key: value', one a setting")
    from ...training.settings.config import TrainConfig, names
    from ...training.settings.values import suggestion

    known = names()
    for name in values:
        setting = known.get(name)
        if setting is None:
            raise UserError(f"unknown setting {name!r}{suggestion(str(name), known)}")
        group, facts = setting.metadata["group"], setting.metadata["facts"]
        if "closed" in facts or not (group in OPEN_GROUPS or "open" in facts):
            raise UserError(f"the setting {name!r} is the app's own: use nora-diffusion train for it")
    config = TrainConfig.from_mapping(values)  # YAML reads 1e3 as text, and the trainer as a number
    return {known[name].name: getattr(config, known[name].name) for name in values}


def preflight(engine: Engine, settings: Mapping[str, Any], photos: Sequence[Path], library: Path) -> list[str]:
    """The trainer's own warnings, each with its remedy. Raises :class:`UserError` for what it would refuse."""
    from ...training import TrainConfig, check_on

    if not photos:
        raise UserError("there is no photo to learn from: drop 3 to 10 JPEG, PNG or WEBP files")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "photos"
        copy_photos(photos, place)
        values = {**settings, "instance_data_dir": str(place), "output_dir": str(library / ".jobs" / "next")}
        findings = check_on(TrainConfig.from_mapping(values), engine.pipe, engine.home)
    fatal = [finding.text for finding in findings if finding.fatal]
    if fatal:
        raise UserError(without_dashes(" ".join(fatal)))
    return [without_dashes(finding.text) for finding in findings]
