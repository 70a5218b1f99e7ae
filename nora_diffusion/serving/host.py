"""Adapters in host memory: each file is read and checked once, and a shared basis is kept once."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..conversion.plain_lora import as_adapter
from ..formats.adapter_file import inspect_adapter, open_adapter
from ..formats.adapter_info import AdapterInfo
from ..formats.keys import frozen_factors
from ..io.tensors import Tensors, named_hash
from ..loaders.load import check_open
from .subjects import Source


class Basis(dict[str, Tensor]):
    """Frozen factors that adapters share, by file key."""


@dataclass(frozen=True)
class Structure:
    """What adapters have in common that differ in their trained values only, so that one can take another's place.

    ``components``: their configs as text. ``basis``: the hash of their frozen factors. ``layout``: key, dtype and shape
    of each trained tensor.
    """

    components: str
    basis: str
    layout: tuple[tuple[str, torch.dtype, torch.Size], ...]


@dataclass(frozen=True, eq=False)
class Held:
    """An adapter in host memory. ``values``: the bytes of its trained tensors, in the order of the layout."""

    info: AdapterInfo
    structure: Structure
    values: Tensor
    basis: Basis

    @property
    def trained(self) -> list[Tensor]:
        """The trained tensors in the order of the layout; views of the bytes."""
        sizes = [dtype.itemsize * shape.numel() for _, dtype, shape in self.structure.layout]
        parts = zip(self.values.split(sizes), self.structure.layout, strict=True)
        return [part.view(dtype).view(shape) for part, (_, dtype, shape) in parts]

    @property
    def tensors(self) -> Tensors:
        """All tensors by file key."""
        keys = (key for key, _, _ in self.structure.layout)
        return {**dict(zip(keys, self.trained, strict=True)), **self.basis}


class HostCache:
    """The most recently used adapters of a pipeline's base, in at most ``most`` bytes; one at least."""

    def __init__(self, pipe: Any, most: int) -> None:
        self._pipe, self.most = pipe, most
        self._held: OrderedDict[Source, Held] = OrderedDict()
        self._bases: WeakValueDictionary[str, Basis] = WeakValueDictionary()
        self._alike: WeakValueDictionary[Structure, Held] = WeakValueDictionary()
        self._own_bytes = self.reads = 0

    def __len__(self) -> int:
        return len(self._held)

    @property
    def bytes(self) -> int:
        """The bytes of the trained tensors and of the bases."""
        bases = [basis for ref in self._bases.valuerefs() if (basis := ref()) is not None]  # others may read this
        return self._own_bytes + sum(tensor.nbytes for basis in bases for tensor in basis.values())

    @property
    def sources(self) -> list[Source]:
        """What is held."""
        return list(self._held)

    def get(self, source: Source) -> Held:
        """The adapter, from memory or its file; a plain LoRA of another tool too. Raises :class:`UserError`."""
        if source in self._held:
            self._held.move_to_end(source)
            return self._held[source]
        held = self._held[source] = self._read(source)
        self._own_bytes += held.values.nbytes
        while self.bytes > self.most and len(self._held) > 1:
            self.forget(next(iter(self._held)))
        return held

    def forget(self, source: Source) -> None:
        """Drop an adapter."""
        if held := self._held.pop(source, None):
            self._own_bytes -= held.values.nbytes

    def _read(self, source: Source) -> Held:
        self.reads += 1
        with open_adapter(source.path) as opened:
            if opened.info.is_ours:
                info, tensors = check_open(self._pipe, opened, known=lambda info: self._bases.get(info.basis_sha256))
            else:  # as an adapter of ours: the layers of other libraries do not follow the rows of a pass
                info, tensors = as_adapter(self._pipe, inspect_adapter(opened.info.path))
        frozen = frozen_factors(tensors)  # of a file without a hash too: layers share them, so no slot exchanges them
        trained = {key: value for key, value in tensors.items() if key not in frozen}
        sha256 = (info.basis_sha256 or named_hash(frozen)) if frozen else ""
        basis = self._bases.setdefault(sha256, Basis(frozen)) if frozen else Basis()
        keys = sorted(trained, key=lambda key: (-trained[key].dtype.itemsize, key))  # so that views are aligned
        layout = tuple((key, trained[key].dtype, trained[key].shape) for key in keys)
        structure = Structure(_as_text(info), sha256, layout)
        if (first := self._alike.get(structure)) is not None:
            info, structure = _shared(info, first.info), first.structure
        values = [trained[key].contiguous().flatten().view(torch.uint8) for key in keys]
        held = Held(info, structure, torch.cat(values), basis)
        self._alike.setdefault(structure, held)
        return held


def _as_text(info: AdapterInfo) -> str:
    return repr((sorted((name, sorted(config.items())) for name, config in info.components.items()), info.tokens))


def _shared(info: AdapterInfo, first: AdapterInfo) -> AdapterInfo:
    """The description with those tables of another one that are equal: of ten thousand, they are kept once."""
    tables: dict[str, Any] = {
        field.name: own
        for field in dataclasses.fields(info)
        if isinstance(own := getattr(first, field.name), Mapping) and own == getattr(info, field.name)
    }
    return dataclasses.replace(info, **tables)
