"""Settings of a planned run, with every default filled in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .config import LossWeighting, Precision, Schedule, TimestepSampling, TrainConfig, settings


@dataclass(kw_only=True)
class ResolvedConfig(TrainConfig):
    """A :class:`TrainConfig` in which all defaults that depend on base, method, data or checkpoint are filled in.

    A setting that is still ``None`` (such as ``validation_prompt``) is off. If ``text_encoder_lr`` or ``token_lr`` is
    ``None``, :attr:`rates` uses ``learning_rate``.
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
        assert not missing, f"unresolved settings: {missing}"

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates of ``denoiser``, ``text_encoder`` and ``tokens``, before ``scale_lr``."""
        own = {"denoiser": None, "text_encoder": self.text_encoder_lr, "tokens": self.token_lr}
        return {name: self.learning_rate if rate is None else rate for name, rate in own.items()}

    def images_per_step(self, processes: int) -> int:
        """Instance images per optimizer step, over all processes and accumulated batches."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes


def resolved(config: TrainConfig, **values: Any) -> ResolvedConfig:
    """``config`` with ``values``, as a :class:`ResolvedConfig`; all of its required settings must be set."""
    return ResolvedConfig(**{f.name: getattr(config, f.name) for f in settings()} | values)
