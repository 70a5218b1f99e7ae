"""Copy an adapter's weights over those of a loaded one, in place, so that a compiled model is not recompiled."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..adapters import AdapterConfig, NoraLayer
from ..errors import UserError
from ..formats.adapter_info import AdapterInfo
from ..formats.keys import file_key
from ..io.tensors import Tensors
from ..pipelines.components import Modules, adapter_configs, nora_layers
from .active import active_adapters, set_active, undone_on_error
from .inject import set_origin
from .rank import cut_rank
from .tokens import token_parameters, tokens_of

STRUCTURE = ("core", "trained", "blocks", "rank_mask", "magnitude", "router", "num_experts", "experts")
"""Config fields that must be equal; the others affect only shapes, which are compared, or scales, which are set."""


def swap(
    modules: Modules, name: str, info: AdapterInfo, tensors: Tensors, activate: bool, weight: float, rank: int | None
) -> None:
    """Copy checked tensors over those of the adapter ``name``; ``rank`` as in :func:`.rank.set_rank`.

    Raises :class:`UserError`, without a change, if the two adapters differ in targets, shapes or structure, or if other
    adapters share a basis that would change.
    """
    configs = info.configs
    holders = [component for component, module in modules.items() if nora_layers(module, name)]
    if not holders:
        raise UserError(f"there is no adapter {name!r} of this toolkit to replace: load it without hotswap first")
    if sorted(holders) != sorted(configs):
        raise _refusal(name, info, f"it is for the {', '.join(configs)}, the loaded one for the {', '.join(holders)}")
    copies: list[tuple[Tensor, Tensor]] = []
    for component, config in configs.items():
        module = modules[component]
        _check_structure(name, info, config, adapter_configs(module)[name])
        copies += _planned_copies(module, component, name, info, tensors)
    copies += _planned_tokens(modules, name, info, tensors)
    with undone_on_error(modules):  # a prepared model may refuse the adapter: before its factors are gone
        for component in configs:
            module = modules[component]
            for layer in nora_layers(module, name).values():
                layer.set_scale(name, weight)
            if activate and name not in active_adapters(module):
                set_active(module, [*active_adapters(module), name])
        if all(config.rank_mask for config in configs.values()):
            cut_rank(modules, name, rank)  # the rank of the replaced adapter does not apply to the new one
    with torch.no_grad():
        for target, value in copies:
            target.copy_(value)
    for component, config in configs.items():
        module = modules[component]
        adapter_configs(module)[name] = copy.deepcopy(config)
        set_origin(module, name, info)
        for path, layer in nora_layers(module, name).items():
            layer.states[name].native_scale = config.scale_for(path)
            layer.set_scale(name, weight)


def _refusal(name: str, info: AdapterInfo, reason: str) -> UserError:
    return UserError(
        f"{info.path} cannot replace {name!r} in place: {reason}; delete {name!r} and load the file without hotswap"
    )


def _check_structure(name: str, info: AdapterInfo, new: AdapterConfig, old: AdapterConfig) -> None:
    for axis in STRUCTURE:
        if getattr(new, axis) != getattr(old, axis):
            raise _refusal(name, info, f"it has {axis}={getattr(new, axis)!r}, the loaded one {getattr(old, axis)!r}")


def _planned_copies(
    module: nn.Module, component: str, name: str, info: AdapterInfo, tensors: Tensors
) -> list[tuple[Tensor, Tensor]]:
    layers = nora_layers(module, name)
    loaded = {
        file_key(component, path, factor): (layer, value)
        for path, layer in layers.items()
        for factor, value in layer.delta(name).state_dict().items()
    }
    keys = {key for key in tensors if key.startswith(f"{component}.")}
    different = sorted(keys ^ set(loaded))
    if different:
        raise _refusal(name, info, f"they adapt different projections ({different[0]})")
    planned = []
    for key, (layer, target) in loaded.items():
        if target.shape != tensors[key].shape:
            raise _refusal(name, info, f"{key} is {list(tensors[key].shape)}, the loaded one {list(target.shape)}")
        value = tensors[key].to(target)
        if target.data_ptr() in _other_buffers(layer, name) and not torch.equal(target, value):
            raise _refusal(name, info, "another loaded adapter shares the basis that would change")
        planned.append((target, value))
    return planned


def _planned_tokens(modules: Modules, name: str, info: AdapterInfo, tensors: Tensors) -> list[tuple[Tensor, Tensor]]:
    loaded = {word: list(vectors) for word, vectors in tokens_of(modules, name).items()}
    if list(loaded.items()) != list(info.tokens.items()):
        new, old = (" ".join(words) or "none" for words in (info.tokens, loaded))
        raise _refusal(name, info, f"its new tokens are {new}, those of the loaded one {old}")
    planned = []
    for key, target in token_parameters(modules, name).items():
        if target.shape != tensors[key].shape:
            raise _refusal(name, info, f"{key} is {list(tensors[key].shape)}, the loaded one {list(target.shape)}")
        planned.append((target.data, tensors[key].to(target)))
    return planned


def _other_buffers(layer: NoraLayer, name: str) -> set[int]:
    """Addresses of the frozen factors of a layer's other adapters."""
    others = (delta for other, delta in layer.nora_delta.items() if other != name)
    return {buffer.data_ptr() for delta in others for buffer in delta.buffers()}
