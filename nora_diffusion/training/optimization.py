"""AdamW over the trained factors, learning-rate schedules and clipping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from .config import TrainConfig


def scaled_rate(rate: float, config: TrainConfig, processes: int) -> float:
    """The learning rate, times devices, accumulation and batch size where ``scale_lr`` asks for that."""
    factor = config.gradient_accumulation_steps * (config.train_batch_size or 1) * processes if config.scale_lr else 1
    return rate * factor


def build_optimizer(
    config: TrainConfig, parameters: Mapping[str, nn.Parameter], processes: int = 1
) -> torch.optim.Optimizer:
    """AdamW with one group for the denoiser and, where they are trained, one for the text encoders.

    Raises :class:`UserError` if there is nothing to train.
    """
    if not parameters:
        raise UserError("nothing would be trained: --target_modules matches no projection of the base")
    rate = config.learning_rate or 0.0
    groups = []
    for is_text, group_rate in ((False, rate), (True, config.text_encoder_lr or rate)):
        own = [value for name, value in parameters.items() if name.startswith("text_encoder") == is_text]
        if own:
            groups.append({"params": own, "lr": scaled_rate(group_rate, config, processes)})
    return _adamw(config)(
        groups,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )


def _adamw(config: TrainConfig) -> Any:
    if config.use_8bit_adam:
        from importlib import import_module

        return import_module("bitsandbytes").optim.AdamW8bit
    return torch.optim.AdamW


def build_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """The learning-rate schedule of diffusers by name, stepped once an optimizer step."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        config.lr_scheduler or "constant",
        optimizer=optimizer,
        num_warmup_steps=config.lr_warmup_steps or 0,
        num_training_steps=steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )


def clip(parameters: Mapping[str, nn.Parameter], most: float) -> float:
    """Clip the gradients to the norm ``most``; returns the norm before."""
    return float(nn.utils.clip_grad_norm_(list(parameters.values()), most))


def schedule_state(schedule: Any) -> dict[str, Any]:
    """What JSON needs to hold of a schedule: all but its functions, which the config rebuilds."""
    return {key: value for key, value in schedule.state_dict().items() if key != "lr_lambdas"}


def restore_schedule(schedule: Any, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put a schedule and the optimizer's rates back to where :func:`schedule_state` found them."""
    schedule.load_state_dict({**state, "lr_lambdas": [None] * len(optimizer.param_groups)})
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate
