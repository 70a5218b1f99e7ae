"""Which layers of a model are the same projection in consecutive blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...adapters import NoraLayer
from ..hooks.trained import Layer
from ..planning.starting_ranks import part_of_pass
from .weight_noise import frozen_weight

BLOCK = re.compile(r"^(?:.*\.)?(\w+s)\.\d+\.")
"""The innermost numbered block of a path, such as ``transformer_blocks.0`` or ``resnets.1``."""


def name_in_block(path: str) -> str:
    """The name of a projection without the blocks that it is in.

    ``up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q`` -> ``transformer_blocks.attn1.to_q``.
    """
    return BLOCK.sub(r"\1.", path)


def layers_before(layers: Mapping[Layer, NoraLayer]) -> dict[Layer, Layer]:
    """For each layer the one before it with the same name, shape of the weight and component, if there is one.

    In the order in which a model runs its layers.
    """
    last: dict[tuple[str, str, tuple[int, ...]], Layer] = {}
    before: dict[Layer, Layer] = {}
    for component, path in sorted(layers, key=lambda key: part_of_pass(key[1])):
        kind = component, name_in_block(path), tuple(frozen_weight(layers[component, path]).shape)
        if kind in last:
            before[component, path] = last[kind]
        last[kind] = component, path
    return before
