"""Notices changes of the factors of chains, so that what was made of them can be kept until then."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from .chain import ChainDelta


class FactorState:
    """Asked in every pass of every layer, so it reads the tables of ``nn.Module`` without its slow lookup."""

    def __init__(self) -> None:
        self._chains: list[ChainDelta] = []
        self._tables: list[dict[str, Any]] = []

    def of(self, chains: Sequence[ChainDelta]) -> tuple[object, ...]:
        """Equal to the former value of the same chains as long as their ranks and factors are the same."""
        if chains != self._chains:
            modules = [module for chain in chains for module in chain.modules()]
            self._chains = [*chains]
            self._tables = [table for m in modules for table in (m._parameters, m._buffers) if table]
        factors = (factor for table in self._tables for factor in table.values())
        return self._chains, [chain.rank for chain in chains], versions(factors)


def versions(tensors: Iterable[Tensor]) -> tuple[list[int], list[int]]:
    """Changes if one of these tensors is replaced or written to.

    Inference tensors count no versions; they cannot be changed outside of inference mode either.
    """
    known = list(tensors)
    return [t.data_ptr() for t in known], [t._version for t in known if not t.is_inference()]
