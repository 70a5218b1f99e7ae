"""Inner ranks by layer from the gradients of dense cores, at the size of equal ranks."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest

from torch import Tensor

from ...adapters import AdapterConfig
from ...adapters.shapes import inner_rank, inner_rank_cost
from ...adapters.tuner.build import flat_weight
from ...pipelines.components import Modules, nora_layers
from .gradients import Layer
from .rules import allocate
from .scores import energy


def inner_ranks(
    modules: Modules, adapter: str, config: AdapterConfig, gradients: Mapping[Layer, Tensor]
) -> dict[str, int]:
    """The inner rank of each layer by path, with at most as many trained parameters as ``config`` has.

    Layers of two text encoders with the same path have the same rank: their scores and costs are added.
    """
    scores: dict[str, list[float]] = {}
    costs: dict[str, int] = {}
    total = 0
    for (component, path), gradient in gradients.items():
        r = gradient.shape[1]
        layer = nora_layers(modules[component], adapter)[path]
        cost = inner_rank_cost(config, flat_weight(layer.base_layer).shape, r)
        scores[path] = [sum(pair) for pair in zip_longest(scores.get(path, []), energy(gradient), fillvalue=0.0)]
        costs[path] = costs.get(path, 0) + cost
        total += cost * inner_rank(config, r, path)
    return allocate(scores, costs, total)
