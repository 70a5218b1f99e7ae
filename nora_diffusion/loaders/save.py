"""Save an adapter of a pipeline to a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..adapters import AdapterConfig
from ..adapters.tuner.build import flat_weight
from ..errors import UserError, quoted
from ..formats.adapter_file import inspect_adapter
from ..formats.adapter_info import DESCRIPTIVE, FORMAT_VERSION, AdapterInfo, BasisKind
from ..formats.adapter_writing import Finish, Part, write_adapter
from ..formats.keys import file_key, is_frozen
from ..formats.model_card import write_card
from ..io.tensors import Tensors
from ..pipelines.base import base_id
from ..pipelines.components import Modules, adapter_configs, components, nora_layers, refuse_merged, refuse_offloaded
from ..pipelines.fingerprints import fingerprint
from ..pipelines.precision import DTYPES, check_dtype
from ..versions import versions
from .active import require_adapter, unknown_adapter
from .inject import check_path, origin, refuse_whole_modules
from .locking import one_at_a_time
from .tokens import token_parameters, tokens_of


@one_at_a_time
def save_adapter(
    pipe: Any,
    path: str | Path,
    adapter_name: str = "default",
    *,
    dtype: str | None = None,
    basis: BasisKind = "own",
    basis_dir: str | Path | None = None,
    info: AdapterInfo | Mapping[str, Any] | None = None,
    card: str | None = None,
    finish: Finish | None = None,
) -> Path:
    """Write ``path/nora_adapter.safetensors`` and its model card; returns the file.

    Trained factors keep their dtype unless ``dtype`` (fp32, fp16 or bf16) is given. Frozen factors are stored
    in the config's ``basis_dtype``, to which they were rounded before training, so saving and loading is exact.
    ``basis="shared"`` stores the frozen factors in ``bases/<sha256>.safetensors`` beside the adapter's folder, where
    other adapters can use them. ``info`` describes the adapter (trigger, prompts ...; default: the description of the
    file it was loaded from). ``card``: extra text for the model card. ``finish``: changes what is saved, such as the
    ranks of layers (``formats.compacting``); the adapter in the pipeline stays as it is.
    Raises :class:`UserError` for an unknown name, dtype or ``info`` key, a ``path`` that names a file, a method without
    a basis to share, and while an adapter is fused or weights are offloaded.
    """
    modules = components(pipe)
    check_path("path", path)
    if basis_dir is not None:
        check_path("basis_dir", basis_dir)
    if not isinstance(card, str | None):
        raise UserError(f"card={quoted(card)} is not text")
    folder, holders = _check(modules, path, adapter_name, dtype, basis)
    result = _describe(origin(modules, adapter_name) if info is None else info)
    result.base, result.basis, result.versions = base_id(pipe), basis, versions()
    tensors: Tensors = {}
    contents = {name: _part(module, adapter_name) for name, module in holders.items()}
    for name, part in (contents if finish is None else finish(contents)).items():
        _describe_component(result, name, holders[name], adapter_name, part)
        factors = {file_key(name, path, f): v for path, own in part.layers.items() for f, v in own.items()}
        tensors |= {key: _stored(key, value, part.config, dtype) for key, value in factors.items()}
    result.tokens = {word: list(own) for word, own in tokens_of(modules, adapter_name).items()}
    result.format_version = FORMAT_VERSION if result.tokens else 1
    tensors |= {key: _trained(value.detach(), dtype) for key, value in token_parameters(modules, adapter_name).items()}
    file = write_adapter(folder, tensors, result, basis_dir)
    write_card(folder, inspect_adapter(file), card)
    return file


def _check(
    modules: Modules, path: str | Path, adapter_name: str, dtype: str | None, basis: BasisKind
) -> tuple[Path, Modules]:
    """The folder, and the components that hold the adapter. Raises as :func:`save_adapter`."""
    if dtype is not None:
        check_dtype(dtype, DTYPES)
    if not isinstance(basis, str) or basis not in get_args(BasisKind):
        raise UserError(f"basis={quoted(basis)} is unknown: choose one of {', '.join(get_args(BasisKind))}")
    folder = Path(path).expanduser()
    if folder.suffix == ".safetensors":
        raise UserError(f"{path} is a file name: give a folder for the adapter and its card")
    require_adapter(modules, adapter_name)
    holders = {name: module for name, module in modules.items() if nora_layers(module, adapter_name)}
    if not holders:
        raise unknown_adapter(modules, adapter_name)
    for module in holders.values():
        config = adapter_configs(module)[adapter_name]
        refuse_whole_modules(config)
        if basis == "shared" and not config.frozen_outer:
            raise UserError(f"method {config.method!r} has no frozen basis to share: save it with basis='own'")
    refuse_merged(modules)
    refuse_offloaded(modules)
    return folder, holders


def _describe_component(info: AdapterInfo, name: str, module: nn.Module, adapter_name: str, part: Part) -> None:
    """Add the description of one component: the config, the base's fingerprints and the shapes of its layers."""
    config = part.config
    layers = {path: layer for path, layer in nora_layers(module, adapter_name).items() if path in part.layers}
    info.components[name] = config.to_dict()
    info.base_fingerprint[name] = {p: round(fingerprint(layer.base_layer, p), 9) for p, layer in layers.items()}
    info.conv_shapes |= {
        f"{name}.{p}": list(layer.base_layer.weight.shape[1:])
        for p, layer in layers.items()
        if isinstance(layer.base_layer, nn.Conv2d)
    }
    if not config.stored_outer:
        info.shapes |= {f"{name}.{p}": list(flat_weight(layer.base_layer).shape) for p, layer in layers.items()}


def _part(module: nn.Module, adapter_name: str) -> Part:
    layers = {
        path: {
            factor.rpartition(".")[2]: value.detach()
            for factor, value in layer.delta(adapter_name).state_dict().items()
        }
        for path, layer in nora_layers(module, adapter_name).items()
    }
    return Part(adapter_configs(module)[adapter_name], layers)


def _describe(info: AdapterInfo | Mapping[str, Any] | None) -> AdapterInfo:
    if not isinstance(info, AdapterInfo | Mapping | None):
        raise UserError(f"info={quoted(info)} is not a description: give a dict with keys such as {DESCRIPTIVE[0]}")
    values = dict(info) if isinstance(info, Mapping) else {k: getattr(info, k) for k in DESCRIPTIVE if info}
    unknown = set(values) - set(DESCRIPTIVE)
    if unknown:
        raise UserError(f"info key {sorted(unknown)[0]!r} is unknown: use {', '.join(DESCRIPTIVE)}")
    return AdapterInfo(components={}, **values)


def _stored(key: str, value: Tensor, config: AdapterConfig, dtype: str | None) -> Tensor:
    if is_frozen(key):
        return value.to("cpu", getattr(torch, config.basis_dtype))
    return _trained(value, dtype)


def _trained(value: Tensor, dtype: str | None) -> Tensor:
    return value.to("cpu", DTYPES[dtype] if dtype else value.dtype)
