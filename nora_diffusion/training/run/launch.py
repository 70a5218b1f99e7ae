"""The processes and the device of a run, as `accelerate launch` sets them."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from ...errors import UserError
from ..settings.config import TrainConfig

OFF = ("", "0", "false", "no", "off", "n", "f")
SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}
"""Ways to shard a model over several devices. An adapter is small, so each process has a whole copy."""
PRECISIONS = ("no", "fp16", "bf16")


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Use accelerate for device and processes only; precision, checkpoints and trackers are handled here.

    Raises :class:`UserError` if it is set up for something that the trainer does not do.
    """
    _check_environment(config)
    # On machines without an accelerator device, launched processes connect only with cpu=True.
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    # The other processes wait while rank 0 generates class images or validates, which may exceed the default
    # timeout of ten minutes. If a process dies, the launcher ends the others.
    timeout = InitProcessGroupKwargs(timeout=timedelta(days=1))
    return Accelerator(cpu=launched and not torch.accelerator.is_available(), kwargs_handlers=[timeout])


def _check_environment(config: TrainConfig) -> None:
    """Raise :class:`UserError` for a setting of accelerate that the trainer would ignore or accelerate cannot read."""
    if config.local_rank != -1 and "LOCAL_RANK" not in os.environ:
        raise UserError("--local_rank is set by the launcher: start with `accelerate launch` and leave it out")
    for name, method in SHARDING.items():
        if _value(name) not in OFF:
            raise UserError(
                f"accelerate is set up for {method} ({name}), which the trainer does not support: run `accelerate "
                "config` again without it, or start with `accelerate launch --multi_gpu`"
            )
    if (backend := _value("ACCELERATE_DYNAMO_BACKEND")) not in OFF:
        raise UserError(
            f"accelerate is set up for torch.compile (ACCELERATE_DYNAMO_BACKEND={backend}), which the trainer does not "
            "support: start with `accelerate launch --dynamo_backend no`"
        )
    precision = _value("ACCELERATE_MIXED_PRECISION")
    if precision not in OFF and precision not in PRECISIONS:
        raise UserError(
            f"accelerate is set up for the precision {precision} (ACCELERATE_MIXED_PRECISION), which the trainer does "
            "not support: start with `accelerate launch --mixed_precision bf16`, fp16 or no"
        )
    steps, own = _value("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"), config.gradient_accumulation_steps
    if steps not in ("", "1", "auto", str(own)):
        raise UserError(
            f"accelerate is set up for gradient accumulation over {steps} steps "
            f"(ACCELERATE_GRADIENT_ACCUMULATION_STEPS) and the trainer for {own}: give the trainer "
            f"--gradient_accumulation_steps with the number that you want, and accelerate the same or none"
        )


def _value(name: str) -> str:
    return os.environ.get(name, "").strip().lower()
