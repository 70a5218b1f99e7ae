"""When a resumed run is still the same run."""

from __future__ import annotations

from typing import Any

from ..base import base_id
from ..versions import versions
from .config import TrainConfig, having
from .subject import Subject


def identity_of(config: TrainConfig, pipe: Any, subject: Subject, class_hash: str, processes: int) -> dict[str, Any]:
    """What must be equal for a resumed run to be the same: settings, data, base, versions, processes."""
    values = {name: value for name, value in config.to_dict().items() if name not in having("free")}
    fractions = [config.denoiser_frac, config.text_encoder_frac]
    if config.train_text_encoder_ti:
        fractions.append(config.train_text_encoder_ti_frac)
    if (config.lr_scheduler or "").startswith("constant") and all(fraction == 1 for fraction in fractions):
        values.pop("max_train_steps")  # such a schedule does not depend on the end: a run may be prolonged
    return {
        **values,
        "base": base_id(pipe),
        "photos and captions": subject.data_hash,
        "class pictures": class_hash,
        "tokenizer": config.tokenizer_name,
        "processes": processes,
        "versions": versions(),
    }
