"""Shared by adding and loading: adapter names, file keys, injection through PEFT, undoing a failed change."""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

from ..adapters import AdapterConfig, NoraLayer
from ..adapters.config import Start
from ..adapters.tuner.guards import refuse_fused
from ..errors import UserError, quoted
from ..formats.adapter_info import AdapterInfo
from ..pipelines.components import Modules, adapter_configs, pick, tuner_layers
from ..pipelines.router_inputs import connect, router_input_width
from .active import adapter_names, declare_components, delete_adapter, eject, held, refresh_group_offloading
from .compiling import refuse_unprepared
from .tokens import forget_deleted


def check_new_name(pipe: Any, modules: Modules, name: str, components: Iterable[str]) -> None:
    """Raise :class:`UserError` for a name that is invalid or taken in one of these components.

    Also for components that the pipeline does not have, and for fused q, k and v projections.
    """
    # PEFT and transformers search whole keys for an adapter's name, and for "lora_" to recognize a LoRA.
    if (
        not isinstance(name, str)
        or not re.fullmatch(r"[A-Za-z0-9_-]+", name)
        or name in "nora_delta"
        or "lora_" in name
    ):
        raise UserError(
            f"the adapter name {quoted(name)} is not allowed: use letters, digits, '_' and '-'; it must not contain "
            "'lora_' or be part of 'nora_delta'"
        )
    forget_deleted(pipe, modules)
    chosen = pick(modules, components)
    for module in chosen.values():
        refuse_fused(module)
    if hasattr(nn.ModuleDict(), name):  # adapters are stored in one, by name
        raise UserError(f"the adapter name {name!r} is an attribute of PyTorch's modules: choose another name")
    taken = [component for component, module in chosen.items() if name in adapter_configs(module)]
    if taken:
        raise UserError(
            f"an adapter named {name!r} is already in the {', '.join(taken)}: delete it or choose another name"
        )
    if any(name in path.split(".") for module in chosen.values() for path, _ in module.named_modules()):
        raise UserError(
            f"the adapter name {name!r} is also the name of a module, and PEFT would confuse them: choose another name"
        )


def refuse_whole_modules(config: AdapterConfig) -> None:
    """Raise :class:`UserError` for ``modules_to_save``: adapter files hold factors only."""
    if config.modules_to_save:
        raise UserError(
            f"modules_to_save={config.modules_to_save} cannot be part of an adapter file: leave it out, or use PEFT's "
            "get_peft_model and save_pretrained"
        )


def check_path(name: str, value: object) -> None:
    """Raise :class:`UserError` for an option that is not a path."""
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{name}={quoted(value)} is not a path")


def derived_name(text: str) -> str:
    """An adapter name made from a file name, changed where :func:`check_new_name` would refuse it."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", text).replace("lora_", "lora-") or "adapter"
    reserved = name in "nora_delta" or name.isdigit() or hasattr(nn.ModuleDict(), name)
    return f"adapter_{name}" if reserved else name


def inject(module: nn.Module, config: AdapterConfig, name: str, start: Start) -> None:
    """Inject an adapter into one component through PEFT, and connect its routers to their inputs."""
    refuse_unprepared(module, config, name)
    own = copy.deepcopy(config)
    disabled = any(layer.disable_adapters and held(layer) for layer in tuner_layers(module))
    own.start = replace(start, condition=router_input_width(module, own.router))
    with warnings.catch_warnings():
        # PEFT warns about a second adapter in a model, which is normal use here.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        # A pattern may be for another component of the pipeline.
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match")
        inject_adapter_in_model(own, module, name)
    own.start = Start()
    own.target_modules = config.target_modules  # PEFT replaces long lists by a set of suffixes
    connect(module)
    if disabled:  # disable_lora() holds for new layers too
        for layer in tuner_layers(module):
            layer.enable_adapters(False)
    module._hf_peft_config_loaded = True  # type: ignore[assignment]  # diffusers' and transformers' flag


def tie(layer: NoraLayer, name: str) -> None:
    """Share memory: replace an adapter's frozen factors by equal tensors of another adapter of the layer."""
    delta = layer.delta(name)
    others = [dict(other_delta.named_buffers()) for other, other_delta in layer.nora_delta.items() if other != name]
    for key, buffer in list(delta.named_buffers()):
        owner, _, leaf = key.rpartition(".")
        for other in others:
            twin = other.get(key)
            if (
                twin is not None
                and twin.dtype == buffer.dtype
                and (_is_same(twin, buffer) or torch.equal(twin, buffer))
            ):
                setattr(delta.get_submodule(owner), leaf, twin)
                break


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


@contextmanager
def all_or_nothing(pipe: Any, modules: Modules, name: str) -> Iterator[None]:
    """Remove a partly added adapter after any error, for example out of memory.

    ``requires_grad`` is restored, and an adapter with the same name in another component stays.
    """
    before = _holders(modules, name)
    trained = {id(parameter) for parameter in _parameters(modules) if parameter.requires_grad}
    try:
        with torch.inference_mode(False):  # parameters must stay usable outside of a caller's inference mode
            yield
        for component in _holders(modules, name):
            refresh_group_offloading(modules[component])
        declare_components(pipe, modules)
    except BaseException:
        if not before and _holders(modules, name):
            delete_adapter(pipe, name)
        eject((module for component, module in modules.items() if component not in before), name)
        for parameter in _parameters(modules):
            parameter.requires_grad_(id(parameter) in trained)
        raise


def _holders(modules: Modules, name: str) -> set[str]:
    return {component for component, names in adapter_names(modules).items() if name in names}


def _parameters(modules: Modules) -> Iterator[nn.Parameter]:
    return (parameter for module in modules.values() for parameter in module.parameters())


def set_origin(module: nn.Module, name: str, info: AdapterInfo) -> None:
    """Store the description of an adapter's file with its config."""
    # On the config, so that it is deleted with the adapter, and copied and pickled with the model.
    adapter_configs(module)[name].origin = info


def origin(modules: Modules, name: str) -> AdapterInfo | None:
    """The description of the file or mix that an adapter comes from; None for one made by ``add_adapter``."""
    configs = (adapter_configs(module).get(name) for module in modules.values())
    return next((info for config in configs if (info := getattr(config, "origin", None)) is not None), None)
