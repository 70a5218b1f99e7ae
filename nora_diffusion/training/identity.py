"""When a resumed run is still the same run."""

from __future__ import annotations

from typing import Any

from ..base import base_id
from ..versions import versions
from .config import TrainConfig
from .subject import Subject

FREE_TO_CHANGE = frozenset(
    [
        "pretrained_model_name_or_path",
        "revision",
        "variant",
        "instance_data_dir",
        "class_data_dir",
        "output_dir",
        "overwrite_output_dir",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "resume_from_checkpoint",
        "preflight_only",
        "strict",
        "subjects",
        "rows_at_once",
        "engine",
        "address",
        "subjects_per_task",
        "task_retries",
        "validation_prompt",
        "num_validation_images",
        "validation_epochs",
        "validation_steps",
        "sample_steps",
        "sample_guidance",
        "validation_images",
        "judge",
        "dino",
        "validation_data_dir",
        "validation_split",
        "validation_prompts",
        "early_stopping",
        "save_dtype",
        "license",
        "push_to_hub",
        "export",
        "hub_private",
        "hub_model_id",
        "report_to",
        "logging_dir",
        "local_rank",
        "dataloader_num_workers",
        "num_train_epochs",
        "pre_compute_text_embeddings",
        "use_captions",
        "caption_column",
        "num_class_images",
        "skip_unreadable",
        "cache_latents",
        "sample_batch_size",
        "prior_generation_precision",
        "tokenizer_name",
    ]
)
"""What a resumed run may have otherwise: it changes no number, or what it names is in the identity."""


def identity_of(config: TrainConfig, pipe: Any, subject: Subject, class_hash: str, processes: int) -> dict[str, Any]:
    """What must be equal for a resumed run to be the same: settings, data, base, versions, processes."""
    values = {name: value for name, value in config.to_dict().items() if name not in FREE_TO_CHANGE}
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
