"""The shared basis of a file, from an adapter that is loaded already."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters import AdapterConfig
from ..formats.adapter_info import AdapterInfo
from ..formats.keys import file_key
from ..io.tensors import Tensors, named_hash
from ..pipelines.components import Modules, adapter_configs, nora_layers


def resident_basis(modules: Modules, info: AdapterInfo) -> Tensors | None:
    """The frozen factors that ``info`` shares with a loaded adapter, by file key, so that no file is read for them.

    ``None`` if no loaded adapter has that basis, or if its factors are no longer those of the file: they were cast to
    another dtype, say. So they are hashed, like those of a file.
    """
    names = dict.fromkeys(
        name
        for module in modules.values()
        for name, config in adapter_configs(module).items()
        if getattr(getattr(config, "origin", None), "basis_sha256", "") == info.basis_sha256
    )
    bases = (_frozen(modules, name) for name in names)
    return next((basis for basis in bases if named_hash(basis) == info.basis_sha256), None)


def _frozen(modules: Modules, name: str) -> Tensors:
    return {
        file_key(component, path, factor): _as_stored(buffer, adapter_configs(module)[name])
        for component, module in modules.items()
        for path, layer in nora_layers(module, name).items()
        for factor, buffer in layer.delta(name).named_buffers()
    }


def _as_stored(buffer: Tensor, config: AdapterConfig) -> Tensor:
    """In the dtype of the file, from which the layer may have widened it."""
    return buffer.to(getattr(torch, config.basis_dtype))
