"""The identity of a run: what must not change when it resumes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...pipelines.base import base_id
from ...versions import versions
from ..data.subject import Subject
from ..settings.config import tagged
from ..settings.rank_allocations import STARTS
from ..settings.resolved import ResolvedConfig
from ..settings.strategies import SCHEDULED


def can_extend(config: ResolvedConfig) -> bool:
    """Whether a finished run can be given more steps: no schedule and no strategy depends on the number of steps."""
    return _can_extend(config.to_dict())


def _can_extend(settings: Mapping[str, Any]) -> bool:
    fractions = ["denoiser_frac", "text_encoder_frac"]
    if settings["train_text_encoder_ti"]:
        fractions.append("train_text_encoder_ti_frac")
    is_scheduled = (
        not settings["lr_scheduler"].startswith("constant")
        or settings["strategy"] in SCHEDULED
        or settings["rank_allocation"] in STARTS
    )
    return not is_scheduled and all(settings[name] == 1 for name in fractions)


def identity_of(
    settings: Mapping[str, Any], pipe: Any, subject: Subject, class_hash: str, processes: int
) -> dict[str, Any]:
    """What must be equal when a run resumes: settings, data, base, package versions, number of processes."""
    values = {name: value for name, value in settings.items() if name not in tagged("free")}
    if _can_extend(settings):
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
