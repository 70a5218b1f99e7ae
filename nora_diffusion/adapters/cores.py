"""Cores: the small trained map ``[..., r] -> [..., r]`` between the outer factors of a chain."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class NestedCore(nn.Module):
    """NoRA's inner pair: ``p -> B_in (A_in p)``, ``A_in [r', r]`` Kaiming uniform, ``B_in [r, r']`` zero."""

    def __init__(self, r: int, inner_r: int) -> None:
        super().__init__()
        self.A_in = nn.Parameter(torch.empty(inner_r, r))
        self.B_in = nn.Parameter(torch.zeros(r, inner_r))
        nn.init.kaiming_uniform_(self.A_in, a=math.sqrt(5))

    def pair(self) -> tuple[Tensor, Tensor]:
        """``(A_in, B_in)``: the core as a product ``B_in A_in``."""
        return self.A_in, self.B_in


class DenseCore(nn.Module):
    """LoRA-XS's core (arXiv 2405.17604): ``p -> R p``, ``R [r, r]`` zero, so that the adapter starts as a no-op."""

    def __init__(self, r: int) -> None:
        super().__init__()
        self.R = nn.Parameter(torch.zeros(r, r))

    def pair(self) -> tuple[Tensor, Tensor]:
        """``(R, I)``: the core as a product ``I R``."""
        return self.R, torch.eye(self.R.shape[0], dtype=self.R.dtype, device=self.R.device)
