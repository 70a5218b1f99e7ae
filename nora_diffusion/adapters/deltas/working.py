"""Frozen factors in the dtype of the pass."""

from __future__ import annotations

import torch
from torch import Tensor


class WorkingCopies:
    """Copies of a chain's frozen factors in the dtype in which it trains, each made once.

    In a training step of small layers a cast takes as long as the product that reads it. A copy is made again after its
    factor changed. A trained factor is cast in every pass: it changes in every step, and optimizers that write to
    ``parameter.data`` change it unnoticed.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[object, Tensor]] = {}

    def get(self, name: str, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """The factor in ``dtype``; ``name``: what it is called in this chain."""
        if factor.dtype == dtype:
            return factor
        if factor.requires_grad:
            return factor.to(dtype)
        key = factor.data_ptr(), factor.shape, factor._version, dtype  # the shape depends on the set rank
        kept = self._kept.get(name)
        if kept is None or kept[0] != key:
            # Through fp32, since a CPU converts fp16 to bf16 one number at a time.
            kept = self._kept[name] = key, factor.to(torch.promote_types(torch.float32, dtype)).to(dtype)
        return kept[1]

    def clear(self) -> None:
        """Free the memory of the copies."""
        self._kept.clear()

    def __reduce__(self) -> tuple[type[WorkingCopies], tuple[()]]:
        return WorkingCopies, ()  # a copied or pickled chain makes its own
