"""Trainer settings from the Train tab's form, and the trainer's checks of them."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...io.yaml_text import parse_yaml
from ..backend import Backend
from ..messages import without_dashes
from ..request import MAX_SEED, MAX_STEPS
from .images import distinct
from .jobs import copy_images

MAX_YAML = 4000
WORD = re.compile(r"[^\s<>]{1,40}")
PRESETS: dict[str, tuple[float, float]] = {"Fast": (1 / 3, 1.0), "Balanced": (1.0, 1.0), "Best": (2.5, 0.7)}
"""Multipliers of the base's default steps and learning rate."""

RATE_DEPENDS_ON = ("method", "core", "strategy", "rank_allocation", "optimizer", "lora_pro_moments")
"""Settings that the default learning rate depends on."""
MAX_NUMBER = 10**9
LIMITS: dict[str, float] = {
    "train_batch_size": 64, "gradient_accumulation_steps": 256, "max_train_steps": 10**6, "num_train_epochs": 10**5,
    "rank": 1024, "inner_rank": 1024, "num_experts": 64, "blocks": 64, "num_new_tokens_per_abstraction": 32,
    "crops_per_image": 16, "shuffle_tags": 64, "num_class_images": 1000, "sample_batch_size": 64,
    "num_validation_images": 16, "sample_steps": MAX_STEPS, "sample_guidance": 100, "lr_num_cycles": 1000,
    "chain_links": 64, "seed": MAX_SEED,
}  # fmt: skip
"""Largest value of each number that costs time or memory; ``resolution`` is limited by the base, others by
:data:`MAX_NUMBER`."""

OPEN_GROUPS = ("adapter", "prior", "training", "optimizer")
"""Groups of trainer settings that a page may set."""


def build_settings(
    engine: Backend, preset: str, trigger: str, class_word: str, changes: Mapping[str, Any], extra: str = ""
) -> dict[str, Any]:
    """Trainer settings of a run. ``changes`` override the preset, and the YAML lines of ``extra`` override both.

    Raises :class:`UserError` for invalid values and for settings that a page may not set.
    """
    for field, word, example in (("Class word", class_word, "dog"), ("Trigger word", trigger, "sks")):
        check_word(field, word.strip(), example)
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset[:40]!r}: choose one of {', '.join(PRESETS)}")
    trigger, class_word = trigger.strip(), class_word.strip()
    own = {k: v for k, v in changes.items() if v is not None and v != ""} | read_extra(extra)
    defaults = _defaults(engine, own)
    check_limits(engine, own)
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


def check_limits(engine: Backend, settings: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` for the first number that is too large for this base or any machine."""
    for name, value in settings.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        limit = engine.max_side if name == "resolution" else LIMITS.get(name, MAX_NUMBER)
        if not value <= limit:  # also NaN
            raise UserError(f"{name}={value:g} is too large: choose at most {limit:g}")


def check_word(field: str, word: str, example: str) -> None:
    """Raise :class:`UserError` for anything but one word; suggest several words joined by hyphens."""
    if not word:
        raise UserError(f"'{field}' is empty: enter one word, for example {example}")
    if not WORD.fullmatch(word):
        joined = "-".join(re.sub("[<>]", " ", word).split())[:40] or example
        raise UserError(f"'{field}' is {word[:40]!r}: enter one word, for example {joined}")


def _defaults(engine: Backend, settings: Mapping[str, Any]) -> Any:
    """The trainer's defaults for the base and what else they depend on."""
    from ...training import TrainConfig
    from ...training.settings.defaults import with_defaults

    chosen = {name: settings[name] for name in RATE_DEPENDS_ON if name in settings}
    return with_defaults(TrainConfig.from_mapping({"pretrained_model_name_or_path": engine.source.base, **chosen}))


def read_extra(text: str) -> dict[str, Any]:
    """Parse ``key: value`` lines. Raises :class:`UserError` for settings that a page may not set."""
    if len(text or "") > MAX_YAML:
        raise UserError(f"more settings must be 'key: value' lines, at most {MAX_YAML} characters")
    from ...training.settings.arguments import by_name
    from ...training.settings.config import TrainConfig, settings_by_name

    values = by_name(parse_yaml(text or "", "more settings"), "more settings")
    for name in values:
        metadata = settings_by_name()[name].metadata
        if "closed" in metadata["tags"] or not (metadata["group"] in OPEN_GROUPS or "open" in metadata["tags"]):
            raise UserError(f"the app sets {name!r} itself: use nora-diffusion train to change it")
    config = TrainConfig.from_mapping(values)
    return {name: getattr(config, name) for name in values}


def preflight(engine: Backend, settings: Mapping[str, Any], images: Sequence[Path], library: Path) -> list[str]:
    """The trainer's preflight warnings, before any photo is resized. Files that cannot be read are left out.

    Raises :class:`UserError` if the trainer would refuse the run.
    """
    from ...training import TrainConfig, check_on

    if not images:
        raise UserError("there are no photos to train on: drop 3 to 10 JPEG, PNG, WEBP or HEIC files")
    with tempfile.TemporaryDirectory() as folder:
        copies = Path(folder) / "photos"
        used = distinct(images)
        copy_images(used, copies)
        folders = {"instance_data_dir": str(copies), "output_dir": str(library / ".jobs" / "next")}
        values = {**settings, **folders, "skip_unreadable": True}
        findings = check_on(TrainConfig.from_mapping(values), engine.pipe, engine.device)
    fatal = [finding.text for finding in findings if finding.fatal]
    if fatal:
        raise UserError(_for_page(" ".join(fatal), used))
    return [_for_page(finding.text, used) for finding in findings]


def _for_page(text: str, images: Sequence[Path]) -> str:
    """A finding in the page's words: without dashes, with the names of the images instead of those of their copies."""
    for number, image in enumerate(images):
        text = text.replace(f"{number:03d}-{image.stem}", image.stem)
    return without_dashes(text)
