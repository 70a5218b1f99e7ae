"""When a resumed run is still the same run."""

from __future__ import annotations

from typing import Any

from ...pipelines.base import base_id
from ...versions import versions
from ..data.subject import Subject
from ..settings.config import TrainConfig, having


def may_go_on(config: TrainConfig) -> bool:
    """Whether a finished run may be prolonged: nothing in its schedule depends on the end."""
    fractions = [config.denoiser_frac, config.text_encoder_frac]
    if config.train_text_encoder_ti:
        fractions.append(config.train_text_encoder_ti_frac)
    return (config.lr_scheduler or "").startswith("constant") and all(fraction == 1 for fraction in fractions)


def identity_of(config: TrainConfig, pipe: Any, subject: Subject, class_hash: str, processes: int) -> dict[str, Any]:
    """What must be equal for a resumed run to be the same: settings, data, base, versions, processes."""
    values = {name: value for name, value in config.to_dict().items() if name not in having("free")}
    if may_go_on(config):
        values.pop("max_train_steps")
    return {
        **values,
        "base": base_id(pipe),
        "photos and captions": subject.data_hash,
        "class pictures": class_hash,
        "tokenizer": config.tokenizer_name,
        "processes": processes,
        "versions": versions(),
    }
