"""The adapter in training, as hooks see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters import NoraLayer
from ...adapters.deltas.chain import ChainDelta
from ...formats.compacting import narrow_names
from ...pipelines.components import components, nora_layers
from ..planning.plan import Plan

Layer = tuple[str, str]
"""The component and path of an adapted layer."""


@dataclass(frozen=True)
class RankedChain:
    """The trained factors of a chain at its narrowest point, where its ranks are.

    ``down [k, ...]`` has a row and ``up [..., k]`` a column for each rank: ``A`` and ``B`` of a LoRA, ``A_in`` and
    ``B_in`` of NoRA, ``A_in`` and ``B`` of one-sided NoRA. ``scales [k]``: the trained scales of the ranks, if there
    are any. ``scale``: ``alpha / r``.
    """

    layer: NoraLayer
    delta: ChainDelta
    down: nn.Parameter
    up: nn.Parameter
    scales: nn.Parameter | None
    scale: float

    @property
    def ranks(self) -> int:
        """The number of ranks ``k``."""
        return len(self.down)

    @property
    def factors(self) -> list[tuple[nn.Parameter, int]]:
        """The trained factors that have one entry for each rank, with the dimension of the ranks."""
        return [(self.down, 0), (self.up, 1), *([] if self.scales is None else [(self.scales, 0)])]

    @torch.no_grad()
    def clear(self, ranks: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Set these ``ranks`` (indices) of all factors and of the optimizer's state to 0; so they get no gradient."""
        for factor, dim in self.factors:
            factor.index_fill_(dim, ranks, 0.0)
        self.forget(ranks, optimizer)

    @torch.no_grad()
    def forget(self, ranks: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Set the entries of these ``ranks`` (indices) in the optimizer's state to 0."""
        for factor, dim in self.factors:
            for entry in optimizer.state.get(factor, {}).values():
                if isinstance(entry, Tensor) and entry.shape == factor.shape:
                    entry.index_fill_(dim, ranks, 0.0)


@dataclass(frozen=True)
class Trained:
    """An adapter in training.

    ``parameters``: by file key. ``loss_of``: the loss of a batch that is none of the run's steps, by number.
    """

    plan: Plan
    adapter: str
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    loss_of: Callable[[int], Tensor]

    @cached_property
    def layers(self) -> dict[Layer, NoraLayer]:
        """The layers with the adapter."""
        return {
            (name, path): layer
            for name, module in components(self.plan.pipe).items()
            for path, layer in nora_layers(module, self.adapter).items()
        }

    @cached_property
    def chains(self) -> dict[Layer, RankedChain]:
        """The ranks of each layer; needs an adapter whose factors at the narrowest point are trained."""
        return {key: ranked_chain(layer, self.adapter) for key, layer in self.layers.items()}


def ranked_chain(layer: NoraLayer, adapter: str) -> RankedChain:
    """The ranks of one layer."""
    delta: Any = layer.delta(adapter)
    factors = {name.rpartition(".")[2]: parameter for name, parameter in delta.named_parameters()}
    lower, upper = narrow_names(factors)
    return RankedChain(
        layer, delta, factors[lower], factors[upper], factors.get("l"), layer.states[adapter].native_scale
    )
