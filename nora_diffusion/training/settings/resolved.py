"""The settings of a run with nothing left open: what the training path reads after the run is planned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .config import LossWeighting, Precision, Schedule, TimestepSampling, TrainConfig, settings


@dataclass(kw_only=True)
class ResolvedConfig(TrainConfig):
    """A :class:`TrainConfig` whose settings that depend on base, method, data or checkpoint all have their value.

    What is still ``None`` is off in this run, such as ``validation_prompt``. ``text_encoder_lr`` and ``token_lr`` may
    be ``None``, which means ``learning_rate``: see :attr:`rates`.
    """

    resolution: int
    rank: int
    target_modules: list[str]
    train_batch_size: int
    max_train_steps: int
    seed: int
    snr_gamma: float
    timestep_sampling: TimestepSampling
    loss_weighting: LossWeighting
    learning_rate: float
    lr_scheduler: Schedule
    lr_warmup_steps: int
    mixed_precision: Precision
    sample_steps: int
    sample_guidance: float

    def __post_init__(self) -> None:
        missing = [name for name in ResolvedConfig.__annotations__ if getattr(self, name) is None]
        assert not missing, f"left open: {missing}"

    @property
    def rates(self) -> dict[str, float]:
        """Learning rate of the ``denoiser``, the ``text_encoder`` and new ``tokens``, before ``scale_lr``."""
        own = {"denoiser": None, "text_encoder": self.text_encoder_lr, "tokens": self.token_lr}
        return {name: self.learning_rate if rate is None else rate for name, rate in own.items()}

    def images_per_step(self, processes: int) -> int:
        """Images of the subject in one optimizer step, over all processes and micro-steps."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes


def resolved(config: TrainConfig, **values: Any) -> ResolvedConfig:
    """``config`` with these values. Every setting that :class:`ResolvedConfig` narrows must have one by now."""
    return ResolvedConfig(**{f.name: getattr(config, f.name) for f in settings()} | values)
