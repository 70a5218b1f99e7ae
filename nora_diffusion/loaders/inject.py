"""What adding and loading share: names, file keys, PEFT's injection, all or nothing."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import inject_adapter_in_model
from torch import nn

from ..adapters import AdapterConfig, NoraLayer
from ..adapters.config import Start
from ..adapters.tuner.qkv_guard import refuse_fused
from ..errors import UserError
from ..formats.adapter_info import AdapterInfo
from ..pipelines.components import Modules, adapter_configs, tuner_layers
from ..pipelines.router_inputs import connect, router_input_width
from .active import adapter_names, delete_adapter, held, regroup, take_out
from .tokens import forget_deleted


def check_new_name(pipe: Any, modules: Modules, name: str, components: Sequence[str]) -> None:
    """Raise :class:`UserError` for a name that is taken or cannot be one, and where q, k and v are fused."""
    # PEFT and transformers find an adapter's keys by looking for its name, and LoRAs' by "lora_", anywhere in the key.
    if (
        not isinstance(name, str)
        or not re.fullmatch(r"[A-Za-z0-9_-]+", name)
        or name in "nora_delta"
        or "lora_" in name
    ):
        raise UserError(
            f"the adapter name {name!r} will not do: use letters, digits, '_' and '-', no part of 'nora_delta' and no "
            "'lora_'"
        )
    forget_deleted(pipe, modules)
    for component in components:
        refuse_fused(modules[component])
    if hasattr(nn.ModuleDict(), name):  # adapters are kept in one, by name
        raise UserError(f"the adapter name {name!r} is one that PyTorch's modules use themselves: choose another")
    taken = {c for c in components if name in adapter_configs(modules[c])}
    if taken:
        raise UserError(f"an adapter named {name!r} is already in the {', '.join(sorted(taken))}: delete it or rename")
    if any(name in path.split(".") for c in components for path, _ in modules[c].named_modules()):
        raise UserError(
            f"the adapter name {name!r} is also that of a module, for which PEFT would take it: choose another"
        )


def derived_name(text: str) -> str:
    """An adapter's name after its file's, altered where :func:`check_new_name` would refuse it."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", text).replace("lora_", "lora-") or "adapter"
    awkward = name in "nora_delta" or name.isdigit() or hasattr(nn.ModuleDict(), name)
    return f"adapter_{name}" if awkward else name


def inject(module: nn.Module, config: AdapterConfig, name: str, start: Start) -> None:
    """Put an adapter into one component by PEFT, connected to what its router looks at."""
    own = copy.deepcopy(config)
    disabled = any(layer.disable_adapters and held(layer) for layer in tuner_layers(module))
    own.start = replace(start, condition=router_input_width(module, own.router))
    with warnings.catch_warnings():
        # PEFT warns of every second adapter on a model; several at once is what this toolkit is for.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        # A pattern may be meant for another component of the same pipeline.
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match")
        inject_adapter_in_model(own, module, name)
    own.start = Start()
    own.target_modules = config.target_modules  # PEFT shortens long lists to a set of suffixes
    connect(module)
    if disabled:  # a disabled pipeline stays so as a whole, on projections that had no adapter yet as well
        for layer in tuner_layers(module):
            layer.enable_adapters(False)
    module._hf_peft_config_loaded = True  # type: ignore[assignment]


def tie(layer: NoraLayer, name: str) -> None:
    """Let the frozen factors of an adapter be the tensors of another one of the layer that has equal ones."""
    mine = layer.delta(name)
    others = [delta for other, delta in layer.nora_delta.items() if other != name]
    for key, buffer in list(mine.named_buffers()):
        owner, _, leaf = key.rpartition(".")
        for other in others:
            twin = dict(other.named_buffers()).get(key)
            if twin is not None and twin.dtype == buffer.dtype and torch.equal(twin, buffer):
                setattr(mine.get_submodule(owner), leaf, twin)
                break


@contextmanager
def all_or_nothing(pipe: Any, modules: Modules, name: str) -> Iterator[None]:
    """Takes a half-added adapter out again when anything fails on the way (out of memory, say).

    What wanted gradients then does so again, and an adapter of that name in another component stays.
    """
    before = _holders(modules, name)
    trained = {id(parameter) for parameter in _parameters(modules) if parameter.requires_grad}
    try:
        with torch.inference_mode(False):  # what is made here may be used outside of a caller's inference mode
            yield
        for component in _holders(modules, name):
            regroup(modules[component])
    except BaseException:
        if not before and _holders(modules, name):
            delete_adapter(pipe, name)
        take_out((module for component, module in modules.items() if component not in before), name)
        for parameter in _parameters(modules):
            parameter.requires_grad_(id(parameter) in trained)
        raise


def _holders(modules: Modules, name: str) -> set[str]:
    return {component for component, names in adapter_names(modules).items() if name in names}


def _parameters(modules: Modules) -> Iterator[nn.Parameter]:
    return (parameter for module in modules.values() for parameter in module.parameters())


def remember(module: nn.Module, name: str, info: AdapterInfo) -> None:
    """Keep what is known of an adapter beside its config, where deleting the adapter takes it away again."""
    adapter_configs(module)[name].origin = info


def origin(modules: Modules, name: str) -> AdapterInfo | None:
    """What the file that an adapter was loaded from says of itself, or what made it; None for a fresh one."""
    configs = (adapter_configs(module).get(name) for module in modules.values())
    return next((info for config in configs if (info := getattr(config, "origin", None)) is not None), None)
