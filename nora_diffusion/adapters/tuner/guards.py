"""Shadow the methods of a model that would go wrong while it has adapters.

- ``fuse_qkv_projections()`` of diffusers concatenates the weights of the frozen layers below the adapters, which would
  drop the adapters silently: refused.
- ``save_pretrained()`` would write factors and the names of wrapped layers, or the adapter alone (transformers), and
  no loader opens such a folder again: it writes the model without adapters.
- ``load_lora_adapter()`` of diffusers and ``load_adapter()`` of transformers leave a new LoRA alone active, but reach
  LoRAs only: adapters of all methods become inactive.

The guards shadow the methods on one model, from its first adapter of this package to its last.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ...errors import UserError
from ..deltas.tokens import LearnedEmbedding
from .peft_interface import set_active_names

FUSE = "fuse_qkv_projections"
SAVE = "save_pretrained"
LOAD = ("load_lora_adapter", "load_adapter")
LOADED = "_hf_peft_config_loaded"
"""The flag by which transformers saves an adapter instead of the model."""


class QkvGuard:
    """Stands in for ``fuse_qkv_projections`` of a model: raises :class:`UserError` if that would drop an adapter."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> None:
        live = sorted({name for layer in self.model.modules() for name in unmerged(layer)})
        if live:
            raise UserError(
                f"fuse_qkv_projections() would drop the adapters {', '.join(live)}: it copies the weights below them; "
                "call fuse_lora() first, or delete them (a routed adapter cannot be fused)"
            )
        getattr(type(self.model), FUSE)(self.model)


class SaveGuard:
    """Stands in for ``save_pretrained`` of a model: saves it without adapters, but with weights that are fused into it.

    Warns about the adapters that are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(getattr(type(self.model), SAVE).__get__(self.model))  # diffusers passes what is in it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        left_out = sorted({name for layer in self.model.modules() for name in unmerged(layer)})
        if left_out:
            warnings.warn(
                f"save_pretrained() saves the {type(self.model).__name__} without the adapters {', '.join(left_out)}: "
                "save them with save_adapter, or call fuse_lora() first",
                stacklevel=2,
            )
        with without_wrappers(self.model):
            return getattr(type(self.model), SAVE)(self.model, *args, **kwargs)


class LoadGuard:
    """Stands in for a model's loader of LoRAs: what it adds becomes alone active, as it does among LoRAs.

    PEFT activates a new adapter in the layers of its own method, and leaves those of other methods as they are.
    """

    def __init__(self, model: nn.Module, method: str) -> None:
        self.model, self.method = model, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = set(self._names())
        result = getattr(type(self.model), self.method)(self.model, *args, **kwargs)
        if added := [name for name in self._names() if name not in before]:
            for layer in self.model.modules():
                if isinstance(layer, BaseTunerLayer):
                    set_active_names(layer, added)
        return result

    def _names(self) -> list[str]:
        return list(getattr(self.model, "peft_config", ()))


@contextmanager
def without_wrappers(model: nn.Module) -> Iterator[None]:
    """Put the model's own layers in the place of all wrappers of adapters, and the wrappers back afterwards."""
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and own_module(child) is not child
    ]
    loaded = getattr(model, LOADED, False)
    try:
        for parent, name, child in wrapped:
            setattr(parent, name, own_module(child))
        setattr(model, LOADED, False)
        yield
    finally:
        for parent, name, child in wrapped:
            setattr(parent, name, child)
        setattr(model, LOADED, loaded)


def own_module(module: nn.Module) -> nn.Module:
    """The model's own module below the wrappers of adapters."""
    if isinstance(module, BaseTunerLayer):
        return own_module(module.base_layer)
    if isinstance(module, ModulesToSaveWrapper):
        return own_module(module.original_module)
    return module.plain if isinstance(module, LearnedEmbedding) else module


def unmerged(layer: nn.Module) -> set[str]:
    """Names of the unmerged adapters of a tuner layer of any method."""
    if not isinstance(layer, BaseTunerLayer):
        return set()
    names = {name for table in layer.adapter_layer_names for name in getattr(layer, table)}
    return names - set(layer.merged_adapters)


GUARDS: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    FUSE: QkvGuard,
    SAVE: SaveGuard,
    **{method: partial(LoadGuard, method=method) for method in LOAD},
}


def guard(model: nn.Module) -> None:
    """Install the guards, once."""
    for method, stand_in in GUARDS.items():
        if hasattr(type(model), method) and method not in vars(model):
            vars(model)[method] = stand_in(model)


def unguard(model: nn.Module) -> None:
    """Remove the guards."""
    for method in GUARDS:
        vars(model).pop(method, None)


def refuse_fused(model: nn.Module) -> None:
    """Raise :class:`UserError` if q, k and v are fused: nothing calls the single projections, nor their adapters."""
    if any(getattr(module, "fused_projections", False) and _reads_fused(module) for module in model.modules()):
        raise UserError(
            f"the q, k and v projections of the {type(model).__name__} are fused: call unfuse_qkv_projections() first"
        )


def _reads_fused(attention: nn.Module) -> bool:
    # diffusers' older attention keeps its fused copy and the flag after unfusing; only its processor shows the state.
    return hasattr(attention, "unfuse_projections") or "Fused" in type(attention.processor).__name__
