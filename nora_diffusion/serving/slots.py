"""Slots: adapters in the pipeline, whose trained values make room for those of another subject."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ..formats.adapter_info import AdapterInfo
from ..formats.keys import file_key
from ..loaders import delete_adapter
from ..loaders.inject import set_origin
from ..loaders.load import load_checked
from ..pipelines.components import canonical, components, nora_layers
from .host import Held, Structure


@dataclass(eq=False)
class Slot:
    """A loaded adapter. ``adapter``: its name in the pipeline. ``structure``: ``None`` if it takes no other values.

    ``targets``: its trained tensors in the order of the layout.
    """

    adapter: str
    info: AdapterInfo
    structure: Structure | None
    targets: list[Tensor]


class Slots:
    """Loads adapters into a pipeline and deletes them. ``before``: called before the pipeline's modules change."""

    def __init__(self, pipe: Any, before: Callable[[], None]) -> None:
        self._pipe, self._before = pipe, before
        self._numbers = count()

    def load(self, held: Held) -> Slot:
        """A new slot with an adapter. Raises :class:`UserError`."""
        self._before()
        name = f"subject_{next(self._numbers)}"
        load_checked(self._pipe, name, held.info, held.tensors)
        if held.info.tokens:  # in the embeddings of a text encoder, under their own words
            return Slot(name, held.info, None, [])
        return Slot(name, held.info, held.structure, self._targets(name, held.structure))

    def _targets(self, name: str, structure: Structure) -> list[Tensor]:
        found = {
            file_key(component, canonical(path), factor): value
            for component, module in components(self._pipe).items()
            for path, layer in nora_layers(module, name).items()
            for factor, value in layer.delta(name).state_dict(keep_vars=True).items()
        }
        return [found[key] for key, _, _ in structure.layout]

    def fill(self, slot: Slot, held: Held) -> None:
        """Give a slot the values of another adapter of its structure. No module changes."""
        with torch.no_grad():
            torch._foreach_copy_(slot.targets, held.trained)
        self._describe(slot, held.info)

    def _describe(self, slot: Slot, info: AdapterInfo) -> None:
        slot.info = info
        for component, module in components(self._pipe).items():
            if component in info.components:
                set_origin(module, slot.adapter, info)

    def clear(self, slot: Slot) -> None:
        """Overwrite the values of a slot by zeros, and forget whose they were."""
        with torch.no_grad():
            torch._foreach_zero_(slot.targets)
        self._describe(slot, AdapterInfo(slot.info.components))

    def delete(self, slot: Slot) -> None:
        """Delete a slot's adapter; nothing of it stays in the pipeline."""
        self._before()
        delete_adapter(self._pipe, slot.adapter)
