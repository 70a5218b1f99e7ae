"""Load an adapter file into a pipeline; everything is checked before the pipeline changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters import AdapterConfig
from ..adapters.config import Start
from ..adapters.shapes import Shape, factor_shapes
from ..adapters.tuner.build import cast_frozen, flat_weight, kernel_of
from ..adapters.tuner.peft_interface import check_weight
from ..adapters.tuner.rank_mask import check_rank
from ..errors import UserError, quoted
from ..formats.adapter_file import OpenAdapter, complete, given_name, inspect_adapter, joined, open_adapter
from ..formats.adapter_info import AdapterInfo
from ..formats.hub import locate
from ..formats.keys import file_key, token_key, token_vectors
from ..formats.structure import require_equal
from ..io.tensors import Tensors
from ..pipelines.base import base_id
from ..pipelines.components import (
    Modules,
    canonical,
    components,
    nora_layers,
    pick,
    refuse_merged,
    refuse_offloaded,
    refuse_serving,
    targets,
)
from ..pipelines.fingerprints import fingerprint, same_weights
from ..pipelines.router_inputs import router_input_width
from .active import active_adapters, keeping_trained, set_active
from .hotswap import swap
from .inject import all_or_nothing, check_new_name, check_path, derived_name, inject, set_origin, tie
from .locking import one_at_a_time
from .rank import cut_rank
from .resident import resident_basis
from .tokens import add_tokens, check_tokens, shapes_of


@dataclass
class LoadedAdapter:
    """Result of ``load_adapter``: ``applied`` of ``total`` tensors (always equal), and the file's description."""

    name: str
    applied: int
    total: int
    info: AdapterInfo

    @property
    def base(self) -> str:
        """The base that the adapter was trained on."""
        return self.info.base

    @property
    def trigger(self) -> str:
        """The trigger word of the subject."""
        return self.info.trigger


@one_at_a_time
def load_adapter(
    pipe: Any,
    path_or_id: str | Path,
    adapter_name: str | None = None,
    activate: bool = True,
    weight: float = 1.0,
    basis_dir: str | Path | None = None,
    rank: int | None = None,
    hotswap: bool = False,
) -> LoadedAdapter:
    """Load an adapter from a file, a folder or a hub id; everything is checked before the pipeline changes.

    A subject of a pack has the address ``pets.nora_pack.safetensors#dog``. LoRA, LoHa, LoKr and textual-inversion
    files of other tools are loaded through diffusers or PEFT.
    ``activate=True`` makes the adapter active at ``weight``, beside those already active; ``False`` does not change the
    active adapters. ``rank`` truncates an adapter that was trained for every rank (:func:`set_rank`).
    ``hotswap=True`` copies the weights over those of the loaded adapter ``adapter_name``, which must have the same
    targets, shapes and structure: no module changes, and a compiled model is not recompiled.
    Raises :class:`UserError` for a damaged file, another base (the message names both), a name that is taken, and a
    hotswap between adapters that do not match.
    """
    modules = components(pipe)
    refuse_serving(modules)
    file = locate(path_or_id)
    with open_adapter(file) as source:
        info = source.info
        is_local = file == Path(path_or_id).expanduser()  # the folder of a download is named by a commit
        if not isinstance(adapter_name, str | None):
            raise UserError(f"the adapter name {quoted(adapter_name)} is not allowed: give text")
        name = adapter_name or derived_name(given_name(info.path if is_local else path_or_id))
        weight = check_weight(name, weight)
        if basis_dir is not None:
            check_path("basis_dir", basis_dir)
        if not info.is_ours:
            from .foreign import load_foreign

            if hotswap or rank is not None:
                option = "hotswap" if hotswap else "rank"
                raise UserError(
                    f"{info.path} is {info.note}: {option} works with adapters of this toolkit only, leave it out"
                )
            info = inspect_adapter(info.path)  # with its hash
            count = load_foreign(pipe, modules, info, name, activate, weight)
            return LoadedAdapter(name, applied=count, total=count, info=info)
        configs = info.configs
        if rank is not None:
            for config in configs.values():
                check_rank(config, rank)
        if not hotswap:
            check_new_name(pipe, modules, name, configs)
        refuse_merged(modules)
        refuse_offloaded(modules)
        tensors = _read(source, modules, basis_dir)
    _check_fit(info, configs, modules, tensors, base_id(pipe))
    if hotswap:
        swap(modules, name, info, tensors, activate, weight, rank)
    else:
        check_tokens(pipe, modules, shapes_of(token_vectors(info.tokens, tensors)))
        insert(pipe, modules, name, info, tensors, activate, weight, rank)
    return LoadedAdapter(name, applied=len(tensors), total=len(tensors), info=info)


def check_adapter(pipe: Any, path: str | Path, basis_dir: str | Path | None = None) -> tuple[AdapterInfo, Tensors]:
    """Read a file and check that it fits the pipeline, without loading it. Raises as :func:`load_adapter`."""
    with open_adapter(path) as source:
        return check_open(pipe, source, basis_dir)


Known = Callable[[AdapterInfo], Tensors | None]
"""Finds the shared basis of a file in memory."""


def check_open(
    pipe: Any, source: OpenAdapter, basis_dir: str | Path | None = None, known: Known | None = None
) -> tuple[AdapterInfo, Tensors]:
    """:func:`check_adapter` for an open file. ``known``: where its basis may be (default: in a loaded adapter)."""
    modules = components(pipe)
    info, tensors = source.info, _read(source, modules, basis_dir, known)
    _check_fit(info, info.configs, modules, tensors, base_id(pipe))
    return info, tensors


@one_at_a_time
def load_checked(pipe: Any, name: str, info: AdapterInfo, tensors: Tensors) -> None:
    """Load what :func:`check_open` has returned, without activating it. Raises :class:`UserError` for a taken name."""
    modules = components(pipe)
    refuse_serving(modules)
    check_new_name(pipe, modules, name, info.configs)
    refuse_merged(modules)
    refuse_offloaded(modules)
    check_tokens(pipe, modules, shapes_of(token_vectors(info.tokens, tensors)))
    insert(pipe, modules, name, info, tensors, activate=False, weight=1.0)


def _read(source: OpenAdapter, modules: Modules, basis_dir: str | Path | None, known: Known | None = None) -> Tensors:
    """All tensors of an adapter of ours; those of a shared basis from memory, if they are known there."""
    info = source.info
    _ = info.axes  # raises for a file of another tool
    own, basis = source.read(), None
    if info.basis == "shared":
        basis = resident_basis(modules, info) if known is None else known(info)
    if basis is None:
        return {key: value.tensor() for key, value in complete(info, own, basis_dir).items()}
    return joined(info, {key: value.tensor() for key, value in own.items()}, basis)


def insert(
    pipe: Any,
    modules: Modules,
    name: str,
    info: AdapterInfo,
    tensors: Tensors,
    activate: bool,
    weight: float,
    rank: int | None = None,
) -> None:
    """Add checked tensors to the pipeline as a new adapter with the description ``info``, all or nothing."""
    with all_or_nothing(pipe, modules, name):
        for component, config in info.configs.items():
            module = modules[component]
            before = active_adapters(module)
            with keeping_trained(module):
                inject(module, config, name, Start(empty=True))
            set_origin(module, name, info)
            _fill(module, component, name, tensors)
            if rank is not None:
                # Before it is active: the whole adapter may be more than a prepared model has room for.
                cut_rank({component: module}, name, rank)
            set_active(module, [*before, name] if activate else before)
            for layer in nora_layers(module, name).values():
                layer.set_scale(name, weight)
        add_tokens(pipe, modules, name, token_vectors(info.tokens, tensors))


def _check_fit(
    info: AdapterInfo, configs: dict[str, AdapterConfig], modules: Modules, tensors: Tensors, base: str
) -> None:
    """Compare a file with a pipeline: the base by its fingerprints, and the keys and shapes of all tensors."""
    wrong_base = _wrong_base(info, base)
    expected: dict[str, tuple[int, ...]] = {}
    for component, module in pick(modules, configs).items():
        config = configs[component]
        condition = router_input_width(module, config.router)
        try:
            layers = {canonical(path): layer for path, layer in targets(module, config).items()}
        except UserError as error:
            raise wrong_base from error
        _check_fingerprint(info.base_fingerprint.get(component, {}), layers, wrong_base)
        for path, layer in layers.items():
            size, kernel = flat_weight(layer).shape, kernel_of(layer)
            _check_kernel(info, f"{component}.{path}", kernel)
            for factor, shape in factor_shapes(config, size, kernel, path, condition).items():
                expected[file_key(component, path, factor)] = shape
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    for encoder, keys in _token_keys(info).items():
        width = pick(modules, [encoder])[encoder].get_input_embeddings().embedding_dim  # type: ignore[operator]
        for key in keys:
            rows, *columns = found.get(key) or (1,)
            if columns and columns != [width]:
                raise wrong_base
            expected[key] = (rows, width)
    require_equal(info, found, expected)


def _wrong_base(info: AdapterInfo, base: str) -> UserError:
    if info.base == base:
        return UserError(
            f"{info.path} was made for the base {base}, but the weights here differ: load it before they are cast to 8 "
            "bits or otherwise changed"
        )
    return UserError(
        f"{info.path} was made for the base {info.base or 'unknown'}, but this pipeline's base is {base}: load it into "
        "its own base"
    )


def _token_keys(info: AdapterInfo) -> dict[str, list[str]]:
    """The keys of the new tokens' embeddings, by text encoder."""
    keys: dict[str, list[str]] = {}
    for number, encoders in enumerate(info.tokens.values()):
        for encoder in encoders:
            keys.setdefault(encoder, []).append(token_key(number, encoder))
    return keys


def _check_kernel(info: AdapterInfo, full: str, kernel: Shape | None) -> None:
    """Raise :class:`UserError` if the file states another kernel than the layer has: exports depend on it."""
    stated = info.conv_shapes.get(full)
    if (None if stated is None else tuple(stated)) != kernel:
        raise UserError(
            f"{info.path} does not match its own description at {full}: it states the kernel "
            f"{stated}, the layer has {None if kernel is None else list(kernel)}; copy it again"
        )


def _check_fingerprint(stored: dict[str, float], layers: dict[str, nn.Module], error: UserError) -> None:
    if set(stored) != set(layers):
        raise error
    if not same_weights({path: fingerprint(layer, path) for path, layer in layers.items()}, stored):
        raise error


@torch.no_grad()
def _fill(module: nn.Module, component: str, name: str, tensors: Tensors) -> None:
    for path, layer in nora_layers(module, name).items():
        delta, weight = layer.delta(name), flat_weight(layer.base_layer)
        for factor, parameter in delta.named_parameters():
            parameter.copy_(tensors[file_key(component, path, factor)])
        for factor, buffer in delta.named_buffers():
            stored = tensors.get(file_key(component, path, factor))
            buffer.data = buffer.to(weight.dtype) if stored is None else cast_frozen(stored.to(buffer.device), weight)
        tie(layer, name)
