"""Cores: the small trained map ``[..., r] -> [..., r]`` between the outer factors of a chain.

``pair()`` returns the factors below and above the narrowest point of the core (``None``: nothing above it). All cores
but the input core start at zero, so that the adapter starts as a no-op.
"""

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

    def pair(self) -> tuple[Tensor, Tensor | None]:
        """``(A_in, B_in)``: the core as a product ``B_in A_in``."""
        return self.A_in, self.B_in


class DenseCore(nn.Module):
    """``p -> R p``, ``R [r, r]`` zero: the core of LoRA-XS (arXiv 2405.17604) and of MoRA (arXiv 2405.12130)."""

    def __init__(self, r: int) -> None:
        super().__init__()
        self.R = nn.Parameter(torch.zeros(r, r))

    def pair(self) -> tuple[Tensor, Tensor | None]:
        """``(R, None)``."""
        return self.R, None


class DiagonalCore(nn.Module):
    """``p -> d * p``, ``d [r]`` zero: one scale for each direction of the outer pair."""

    def __init__(self, r: int) -> None:
        super().__init__()
        self.d = nn.Parameter(torch.zeros(r))

    def pair(self) -> tuple[Tensor, Tensor | None]:
        """``(diag(d), None)``."""
        return torch.diag(self.d), None


class InputCore(nn.Module):
    """``p -> A_in p``, ``A_in [r', r]`` Kaiming uniform: the input half of a nested core.

    The up factor ``[d_out, r']`` of its chain is trained and starts at zero.
    """

    def __init__(self, r: int, inner_r: int) -> None:
        super().__init__()
        self.A_in = nn.Parameter(torch.empty(inner_r, r))
        nn.init.kaiming_uniform_(self.A_in, a=math.sqrt(5))

    def pair(self) -> tuple[Tensor, Tensor | None]:
        """``(A_in, None)``."""
        return self.A_in, None


Core = NestedCore | InputCore | DenseCore | DiagonalCore
