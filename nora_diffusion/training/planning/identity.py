"""When a resumed run is still the same run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...pipelines.base import base_id
from ...versions import versions
from ..data.subject import Subject
from ..settings.config import tagged
from ..settings.resolved import ResolvedConfig


def may_be_extended(config: ResolvedConfig) -> bool:
    """Whether a finished run may get more steps: nothing in its schedule depends on their number."""
    return _may_be_extended(config.to_dict())


def _may_be_extended(settings: Mapping[str, Any]) -> bool:
    fractions = ["denoiser_frac", "text_encoder_frac"]
    if settings["train_text_encoder_ti"]:
        fractions.append("train_text_encoder_ti_frac")
    return settings["lr_scheduler"].startswith("constant") and all(settings[name] == 1 for name in fractions)


def identity_of(
    settings: Mapping[str, Any], pipe: Any, subject: Subject, class_hash: str, processes: int
) -> dict[str, Any]:
    """What must be equal for a resumed run to be the same: settings, data, base, versions, processes."""
    values = {name: value for name, value in settings.items() if name not in tagged("free")}
    if _may_be_extended(settings):
        values.pop("max_train_steps")
    return {
        **values,
        "base": base_id(pipe),
        "photos and captions": subject.data_hash,
        "class pictures": class_hash,
        "tokenizer": settings["tokenizer_name"],
        "processes": processes,
        "versions": versions(),
    }
