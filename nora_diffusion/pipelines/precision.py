"""Number types by the names that flags have for them, and which one suits a device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from ..errors import UserError

AUTO = "auto"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MIXED_DTYPES = {"no": torch.float32, **DTYPES}
"""The same with the word that `accelerate` and the trainer's ``mixed_precision`` have for fp32."""


def resolve_dtype(told: str, device: Any) -> torch.dtype:
    """The number type that a pipeline makes pictures in on ``device``, where ``told`` is one or ``auto``.

    ``auto`` is half precision on a GPU, where SDXL's weights alone are 13 GiB in fp32 and nobody sees the difference:
    bf16 where the hardware multiplies it, since it has fp32's range and nothing overflows; else fp16. Anywhere else it
    is fp32: a CPU is slower with less, and on mps half precision has given black pictures. Raises :class:`UserError`.
    """
    check_dtype(told)
    kind = torch.device(device).type
    if told == AUTO:
        return DTYPES["fp32" if kind != "cuda" else "bf16" if multiplies_bf16() else "fp16"]
    if told == "fp16" and kind == "cpu":
        raise UserError("dtype=fp16 needs a GPU: use bf16 or fp32")
    return DTYPES[told]


def check_dtype(told: str, known: Collection[str] = (AUTO, *DTYPES)) -> None:
    """Raise :class:`UserError` for a dtype name that is not in ``known``."""
    if told not in known:
        raise UserError(f"dtype={told!r} is unknown: choose one of {', '.join(known)}")


def dtype_name(dtype: torch.dtype) -> str:
    """The name that flags have for a number type; torch's own where they have none."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


@contextmanager
def in_fp32(module: nn.Module) -> Iterator[None]:
    """Compute with a module in fp32 and give it back its number type: in fp16 SDXL's VAE overflows."""
    with keeping_dtype(module):
        nn.Module.to(module, torch.float32)
        yield


@contextmanager
def keeping_dtype(module: nn.Module) -> Iterator[None]:
    """Give a module back its number type at the end, whatever happens."""
    dtype = next(module.parameters()).dtype
    try:
        yield
    finally:
        if next(module.parameters()).dtype != dtype:
            nn.Module.to(module, dtype)  # diffusers' own `to` warns of modules to keep in fp32 even if there are none


def best_precision(device: torch.device) -> Literal["no", "bf16"]:
    """What to train in: bf16 where the hardware multiplies it fast, else fp32."""
    if device.type == "cuda":
        return "bf16" if multiplies_bf16() else "no"
    probe: Callable[[], bool] | None = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return "bf16" if device.type == "cpu" and probe is not None and probe() else "no"


def multiplies_bf16() -> bool:
    """Whether the GPU does, and does not only emulate it."""
    return torch.cuda.is_bf16_supported(including_emulation=False)
