"""Refuse diffusers' ``fuse_qkv_projections()`` while adapters are live.

It concatenates the weights of the frozen layers below the adapters, which would drop the adapters silently. The guard
shadows the method on one model, from its first adapter of this package to its last.
"""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...errors import UserError

METHOD = "fuse_qkv_projections"


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
        getattr(type(self.model), METHOD)(self.model)


def unmerged(layer: nn.Module) -> set[str]:
    """Names of the unmerged adapters of a tuner layer of any method."""
    if not isinstance(layer, BaseTunerLayer):
        return set()
    names = {name for table in layer.adapter_layer_names for name in getattr(layer, table)}
    return names - set(layer.merged_adapters)


def guard(model: nn.Module) -> None:
    """Install the guard, once."""
    if hasattr(type(model), METHOD) and METHOD not in vars(model):
        vars(model)[METHOD] = QkvGuard(model)


def unguard(model: nn.Module) -> None:
    """Remove the guard."""
    vars(model).pop(METHOD, None)


def refuse_fused(model: nn.Module) -> None:
    """Raise :class:`UserError` if q, k and v are fused: nothing calls the single projections, nor their adapters."""
    if any(getattr(module, "fused_projections", False) and _reads_fused(module) for module in model.modules()):
        raise UserError(
            f"the q, k and v projections of the {type(model).__name__} are fused: call unfuse_qkv_projections() first"
        )


def _reads_fused(attention: nn.Module) -> bool:
    # diffusers' older attention keeps its fused copy and the flag after unfusing; only its processor shows the state.
    return hasattr(attention, "unfuse_projections") or "Fused" in type(attention.processor).__name__
