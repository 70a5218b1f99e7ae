"""Which adapters of a library a pipeline can use, by the headers of their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import UserError
from ...formats.adapter_file import inspect_adapter
from ...formats.adapter_info import AdapterInfo
from ...formats.foreign import family_of, read_modules
from ...formats.foreign_names import match_projections
from ...io.tensor_file import TensorFile
from ...pipelines.base import base_id
from ...pipelines.components import Modules, canonical, components, projections
from ...pipelines.fingerprints import fingerprint, same_weights
from ..library import NamedAdapter

Layers = dict[str, dict[str, nn.Module]]
"""The projections of each component, by canonical path."""


def usable(pipe: Any, adapters: Sequence[NamedAdapter]) -> tuple[list[NamedAdapter], list[str]]:
    """The adapters that were made for this base, with their ``info``; and a sentence about each of the others."""
    modules = components(pipe)
    layers = {name: {canonical(path): layer for path, layer in projections(m).items()} for name, m in modules.items()}
    fitting, notes = list[NamedAdapter](), list[str]()
    for adapter in adapters:
        try:
            info = adapter.info or inspect_adapter(adapter.path, hashed=False)
            problem = _problem(modules, layers, info)
        except UserError as error:
            problem = str(error)
        if problem:
            notes.append(f"{adapter.name} is left out: {problem}")
        else:
            fitting.append(replace(adapter, info=info))
    if len(notes) > 1 and not fitting:
        notes = [*notes, f"no adapter of the library was made for {base_id(pipe)}"]
    return fitting, notes


def _problem(modules: Modules, layers: Layers, info: AdapterInfo) -> str:
    if not info.is_ours:
        return _foreign_problem(modules, layers, info)
    for component, stored in info.base_fingerprint.items():
        own = layers.get(component, {})
        if not stored.keys() <= own.keys():
            return f"it was made for {info.base or 'another base'}, which has a different architecture"
        if not same_weights({path: fingerprint(own[path], path) for path in stored}, stored):
            return f"it was made for {info.base or 'another base'}, which has different weights"
    return ""


def _foreign_problem(modules: Modules, layers: Layers, info: AdapterInfo) -> str:
    """By the names and widths of its layers, since other tools store no fingerprint."""
    with TensorFile(Path(info.path)) as reader:
        if family_of(reader) == "embedding":
            return "a textual inversion acts where the prompt has its token"
        for (component, path), module in match_projections(modules, info.path, read_modules(reader)).items():
            down, weight = module.shapes(reader).get("down"), layers[component][canonical(path)].weight
            assert isinstance(weight, nn.Parameter)
            if down and down[1] != weight.shape[1]:
                return f"its {module.name} is for a layer with {down[1]} inputs, this base's has {weight.shape[1]}"
    return ""
