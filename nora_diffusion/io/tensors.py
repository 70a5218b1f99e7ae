"""Tensors to write: their hashes, and the bytes of a safetensors file, whose values are checked as the reader checks
them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import UserError
from .tensor_file import hash_of

Tensors = dict[str, Tensor]


def all_finite(value: Tensor) -> bool:
    """Whether a tensor has no NaN or infinity. Checks minimum and maximum, so no temporary tensor is allocated."""
    if not value.numel():
        return True
    low, high = value.aminmax()
    return bool(low.isfinite() and high.isfinite())


def file_bytes(path: Path, tensors: Tensors, metadata: dict[str, str]) -> bytes:
    """The bytes of a safetensors file for ``path``. Raises :class:`UserError` for values that no loader accepts.

    These are NaN and infinity, which a conversion to fp16 makes of every value beyond 65504.
    """
    for key, value in tensors.items():
        if all_finite(value):
            continue
        if value.dtype == torch.float16 and not value.isnan().any():
            raise UserError(
                f"cannot write {path}: {key} has values beyond 65504, the largest of fp16: save it as bf16 or fp32 "
                "(--save_dtype when training, --dtype when exporting)"
            )
        raise UserError(f"cannot write {path}: {key} holds NaN or infinity: train with a lower learning rate")
    return save({key: value.contiguous() for key, value in tensors.items()}, metadata)


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def named_hash(tensors: Tensors) -> str:
    """SHA-256 of the names, shapes, dtypes and bytes of tensors; the same for every file that holds them."""
    plain = ((key, tensors[key].detach().cpu().contiguous()) for key in sorted(tensors))
    return hash_of(
        (
            key,
            tuple(value.shape),
            str(value.dtype).removeprefix("torch."),
            value.flatten().view(torch.uint8).numpy().data,
        )
        for key, value in plain
    )
