"""What an adapter file holds, before it is written: a config and factors for each component."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..adapters import AdapterConfig


@dataclass(frozen=True)
class Part:
    """One component of an adapter: its config, and the factors of each layer by path and name."""

    config: AdapterConfig
    layers: dict[str, dict[str, Tensor]]


Contents = dict[str, Part]
"""The parts of an adapter by component."""
Finish = Callable[[Contents], Contents]
"""Turns what was trained into what is saved."""
