"""Small symmetric matrices in batches."""

from __future__ import annotations

import torch
from torch import Tensor


def eigh(*matrices: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Eigenvalues ``[n, r]`` (not below 0) and eigenvectors ``[n, r, r]`` of positive matrices, in one call.

    On devices without it (Apple GPUs), on the CPU.
    """
    stacked = torch.cat(matrices)
    values, vectors = torch.linalg.eigh(stacked.cpu() if stacked.device.type == "mps" else stacked)
    sizes = [len(matrix) for matrix in matrices]
    values, vectors = values.clamp_(min=0).to(stacked.device), vectors.to(stacked.device)
    return list(zip(values.split(sizes), vectors.split(sizes), strict=True))


def noise(values: Tensor) -> Tensor:
    """The level ``[n, 1]`` below which computed eigenvalues ``[n, r]`` are rounding errors of the largest one."""
    return 4 * values.shape[-1] * torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True)


def inverse_root(values: Tensor) -> Tensor:
    """``1 / sqrt(values)``, and 0 for values that are rounding errors: the root of the pseudo-inverse."""
    kept = values > noise(values)
    return torch.where(kept, values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt(), 0.0)
