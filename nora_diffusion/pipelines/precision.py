"""dtypes by the names that flags use, and the default one for a device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from ..errors import UserError, quoted

AUTO = "auto"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MIXED_DTYPES = {"no": torch.float32, **DTYPES}
"""Values of ``mixed_precision``: ``no`` is fp32, as in accelerate."""


def resolve_dtype(name: str, device: Any) -> torch.dtype:
    """The dtype in which a pipeline generates images on ``device``; ``name`` is ``auto`` or one of :data:`DTYPES`.

    ``auto`` is half precision on a GPU, where SDXL's weights alone take 13 GiB in fp32 and images look the same: bf16
    where the hardware supports it, since it has the range of fp32 and does not overflow, else fp16. On other devices it
    is fp32: half precision is slower on a CPU and has produced black images on mps.

    Raises :class:`UserError` for an unknown name, and for fp16 on a CPU.
    """
    check_dtype(name)
    device_type = torch.device(device).type
    if name == AUTO:
        return DTYPES["fp32" if device_type != "cuda" else "bf16" if supports_bf16() else "fp16"]
    if name == "fp16" and device_type == "cpu":
        raise UserError("dtype=fp16 needs a GPU: use bf16 or fp32")
    return DTYPES[name]


def check_dtype(name: str, known: Collection[str] = (AUTO, *DTYPES)) -> None:
    """Raise :class:`UserError` for a dtype name that is not in ``known``."""
    if not isinstance(name, str) or name not in known:
        raise UserError(f"dtype={quoted(name)} is unknown: choose one of {', '.join(known)}")


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in flags (``fp16``), or torch's own (``float64``) where flags have none."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


def lowered(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Autocast to ``dtype`` if that is fp16 or bf16; else a context that does nothing."""
    lower = dtype in (torch.float16, torch.bfloat16)
    return torch.autocast(device.type, dtype if lower else None, enabled=lower)


@contextmanager
def in_fp32(module: nn.Module) -> Iterator[None]:
    """Run a module in fp32, then restore its dtype (SDXL's VAE overflows in fp16)."""
    with keeping_dtype(module):
        nn.Module.to(module, torch.float32)
        yield


@contextmanager
def keeping_dtype(module: nn.Module) -> Iterator[None]:
    """Restore a module's dtype on exit, also after an exception."""
    dtype = next(module.parameters()).dtype
    try:
        yield
    finally:
        if next(module.parameters()).dtype != dtype:
            nn.Module.to(module, dtype)  # diffusers' `to` warns about modules to keep in fp32 even if there are none


def best_precision(device: torch.device) -> Literal["no", "bf16"]:
    """The default ``mixed_precision`` for training: bf16 where the hardware multiplies it fast, else fp32 (``no``)."""
    if device.type == "cuda":
        return "bf16" if supports_bf16() else "no"
    probe: Callable[[], bool] | None = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return "bf16" if device.type == "cpu" and probe is not None and probe() else "no"


def supports_bf16() -> bool:
    """Whether the GPU has native bf16 arithmetic (PyTorch can also emulate it)."""
    return torch.cuda.is_bf16_supported(including_emulation=False)
