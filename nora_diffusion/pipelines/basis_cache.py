"""Disk cache of outer pairs: computed once for a set of weights and settings, then read.

One entry holds all projections of one component. Its name is a hash of everything that the pairs depend on: the
weights, kind of basis, ranks, placement, power, storage dtype and, for ``awsvd``, the activation strengths.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor, nn

from ..adapters import AdapterConfig
from ..adapters.axes import FROM_WEIGHTS
from ..adapters.config import Start
from ..adapters.deltas.bases import Pair
from ..adapters.shapes import outer_rank
from ..adapters.tuner.build import flat_weight, outer_pair
from ..io import tensor_cache
from ..io.tensors import tensor_hash

VERSION = 1
"""Increment when ``adapters/deltas/bases.py`` computes other values, so that old entries are not used."""


def outer_pairs(
    config: AdapterConfig, layers: Mapping[str, nn.Module], strengths: Mapping[str, Tensor]
) -> dict[str, Pair]:
    """The outer pair of each layer by path, read from the cache or computed and stored; empty for a random basis."""
    if config.basis not in FROM_WEIGHTS:
        return {}
    name = f"basis-{entry_key(config, layers, strengths)}"
    stored = tensor_cache.load(name)
    if stored is None:
        stored = _compute(config, layers, strengths)
        tensor_cache.store(name, stored)
    return {path: (stored[f"{path}.down"], stored[f"{path}.up"]) for path in layers}


def _compute(
    config: AdapterConfig, layers: Mapping[str, nn.Module], strengths: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    config = copy.copy(config)
    config.start = Start(dict(strengths))
    stored = {}
    for path, layer in layers.items():
        down, up = outer_pair(config, layer, path, outer_rank(config, flat_weight(layer).shape, path))
        stored[f"{path}.down"], stored[f"{path}.up"] = down, up
    return stored


def entry_key(config: AdapterConfig, layers: Mapping[str, nn.Module], strengths: Mapping[str, Tensor]) -> str:
    """SHA-256 of everything that the pairs of ``layers`` depend on."""
    weighted = config.basis == "awsvd"
    settings = {
        "version": VERSION,
        "basis": config.basis,
        "placement": config.placement,
        "power": config.power if weighted else None,
        "blocks": config.blocks,
        "dtype": config.basis_dtype,
        "trained": sorted(config.trained_basis),
    }
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        weights = list(pool.map(lambda layer: tensor_hash(flat_weight(layer)), layers.values()))
    entries = [
        (
            path,
            outer_rank(config, flat_weight(layer).shape, path),
            weight,
            tensor_hash(strengths[path]) if weighted else None,
        )
        for (path, layer), weight in zip(layers.items(), weights, strict=True)
    ]
    return hashlib.sha256(json.dumps([settings, sorted(entries)]).encode()).hexdigest()
