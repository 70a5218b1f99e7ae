"""Opens the frozen base of a run and sets its precision."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from ...errors import UserError, first_line
from ...pipelines.base import open_pipeline
from ...pipelines.precision import MIXED_DTYPES, best_precision
from ..settings.config import Precision, TrainConfig
from ..step.denoiser import check_pipeline, denoiser, networks
from ..step.objective import with_zero_snr


def open_base(config: TrainConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """The base pipeline on ``device``, frozen and checked to be one this trainer knows, its denoiser in ``dtype``."""
    pipe = open_pipeline(config.pretrained_model_name_or_path, revision=config.revision, variant=config.variant)
    check_pipeline(config, pipe)
    if config.rescale_zero_snr:
        pipe.scheduler = with_zero_snr(pipe.scheduler)
    if config.tokenizer_name:
        pipe.tokenizer = _load_tokenizer(config.tokenizer_name)
    for module in (pipe.vae, *networks(pipe)):
        module.requires_grad_(False)
        module.eval()
    if config.enable_xformers_memory_efficient_attention:
        pipe.enable_xformers_memory_efficient_attention()
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    nn.Module.to(denoiser(pipe), dtype)  # on the CPU, since the device may have no room for it in fp32
    return pipe.to(device)


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer {name!r}: {first_line(error)}") from error


def opening_dtype(configs: Sequence[TrainConfig], device: torch.device) -> torch.dtype:
    """The denoiser's dtype when the base is opened: that of its runs, where it is known by then.

    :func:`lower_precision` would cast it later anyway. Class images are made by the model in fp32.
    """
    config = configs[0]
    if any(own.with_prior_preservation and own.prior_preservation == "images" for own in configs):
        return torch.float32
    if config.resume_from_checkpoint and not config.mixed_precision:
        return torch.float32  # the checkpoint knows the precision
    return MIXED_DTYPES[config.mixed_precision or launched_precision(device)]


def launched_precision(device: torch.device) -> Precision:
    """The half precision that `accelerate launch` was given, else the best one for the device."""
    given = os.environ.get("ACCELERATE_MIXED_PRECISION", "")  # accelerate sets "no" where it was given nothing, too
    return cast(Precision, given) if given in ("fp16", "bf16") else best_precision(device)


def lower_precision(pipe: Any, dtype: torch.dtype) -> None:
    """Cast the frozen denoiser and text encoders to ``dtype``; on a CPU the denoiser gets channels last."""
    for module in networks(pipe):
        nn.Module.to(module, dtype)  # diffusers' own `to` warns of modules to keep in fp32 even if there are none
    if denoiser(pipe).device.type == "cpu":
        denoiser(pipe).to(memory_format=torch.channels_last)
