"""A layer prepared for ``torch.compile``: all chains that it adds, in one pair of tensors that stay the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...errors import UserError
from ..deltas import functional
from ..deltas.joining import ScaledChain, joined_pair
from .build import flat_weight

Pair = tuple[Tensor, Tensor]


class FixedPair(nn.Module):
    """``A [R, d_in]`` and ``B [d_out, R]`` with ``B A = sum_k s_k B_k A_k`` over the live chains, padded with zeros.

    A pass reads these buffers and no adapter, so that no change of the adapters recompiles its graph. They are in the
    dtype of the frozen weight (fp32 for a weight of 8 bits or less).

    ``others``: live adapters that no pair can hold (mixtures, magnitudes); they are added one by one. ``serves``:
    whether the pair is that of the live chains; it is not if they need more than ``R``. ``rank``: the rows that they
    fill.
    """

    down: Tensor
    up: Tensor

    def __init__(self, base: nn.Module, path: str, max_rank: int) -> None:
        super().__init__()
        weight = flat_weight(base)
        is_wide = weight.is_floating_point() and weight.itemsize > 1
        self.path, self.others, self.serves, self.rank = path, list[str](), True, 0
        for name, shape in {"down": (max_rank, weight.shape[1]), "up": (weight.shape[0], max_rank)}.items():
            empty = torch.zeros(shape, dtype=weight.dtype if is_wide else torch.float32, device=weight.device)
            self.register_buffer(name, empty, persistent=False)

    def pair(self, dtype: torch.dtype) -> Pair | None:
        """The pair in the dtype of the pass; ``None`` if nothing is live. A compiled graph always gets all of it."""
        down, up = self.down, self.up
        if not torch.compiler.is_compiling() and self.rank < len(down):
            if not self.rank:
                return None
            down, up = down[: self.rank], up[:, : self.rank]
        return (down, up) if down.dtype == dtype else (down.to(dtype), up.to(dtype))

    def write(self, chains: Sequence[ScaledChain], others: list[str]) -> None:
        """Make these the live adapters. Raises :class:`UserError` if the chains need more than the prepared rank."""
        self.serves = False
        down, up = self._joined(chains)
        rank, most = len(down), len(self.down)
        if rank > most:
            raise UserError(
                f"{self.path}: these adapters together have rank {rank}, but the model was prepared for {most}: call "
                f"prepare_for_compile with a max_rank of at least {rank}, or activate fewer adapters"
            )
        self.down[:rank].copy_(down)
        self.up[:, :rank].copy_(up)
        self.down[rank:].zero_()
        self.up[:, rank:].zero_()
        self.others, self.rank, self.serves = others, rank, True

    def _joined(self, chains: Sequence[ScaledChain]) -> Pair:
        if not chains:
            return self.down[:0], self.up[:, :0]
        with functional.without_autocast(self.down.device):
            return joined_pair(chains)
