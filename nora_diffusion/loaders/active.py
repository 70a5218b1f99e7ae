"""The active set: list, weigh and delete adapters, ordinary LoRAs too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..adapters import NoraLayer
from ..components import present, tuner_layers
from ..conditions import connect
from ..errors import UserError


def active_adapters(module: nn.Module) -> list[str]:
    """Names of the active adapters of one component."""
    names = [name for layer in tuner_layers(module) for name in layer.active_adapters]
    return [n for n in dict.fromkeys(names) if n in getattr(module, "peft_config", {})]


def set_active(module: nn.Module, names: Sequence[str]) -> None:
    for layer in tuner_layers(module):
        layer.set_adapter(list(names), inference_mode=True)


def list_adapters(pipe: Any) -> dict[str, list[str]]:
    """Names of all adapters (ordinary LoRAs too) by component."""
    found = {name: list(getattr(getattr(pipe, name), "peft_config", {})) for name in present(pipe)}
    return {name: adapters for name, adapters in found.items() if adapters}


def set_adapters(pipe: Any, names: str | Sequence[str], weights: float | Sequence[float] = 1.0) -> None:
    """Make exactly these adapters active, with these weights. Raises :class:`UserError` for an unknown name."""
    names = [names] if isinstance(names, str) else list(names)
    weights = [float(weights)] * len(names) if isinstance(weights, int | float) else list(weights)
    if len(weights) != len(names):
        raise UserError(f"{len(names)} adapters but {len(weights)} weights: give one weight each")
    known = {name for group in list_adapters(pipe).values() for name in group}
    for name in names:
        if name not in known:
            raise UserError(f"there is no adapter named {name!r} in the pipeline: {names_hint(pipe)}")
    for part in present(pipe):
        module = getattr(pipe, part)
        set_active(module, names)
        for layer in tuner_layers(module):
            for name, weight in zip(names, weights, strict=True):
                layer.set_scale(name, weight)


def names_hint(pipe: Any) -> str:
    known = sorted({name for group in list_adapters(pipe).values() for name in group})
    return f"it has {', '.join(known)}" if known else "it has none"


def delete_adapter(pipe: Any, adapter_name: str) -> None:
    """Remove an adapter from every component; layers left without adapters are taken out again."""
    if not any(adapter_name in names for names in list_adapters(pipe).values()):
        raise UserError(f"there is no adapter named {adapter_name!r} in the pipeline: {names_hint(pipe)}")
    for part in present(pipe):
        module = getattr(pipe, part)
        if adapter_name in getattr(module, "peft_config", {}):
            for layer in list(tuner_layers(module)):
                layer.delete_adapter(adapter_name)
            del module.peft_config[adapter_name]
            eject_empty(module)
            connect(module)


def eject_empty(module: nn.Module) -> None:
    for parent in list(module.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, NoraLayer) and not child.nora_delta:
                setattr(parent, child_name, child.base_layer)
    if not getattr(module, "peft_config", None) and not any(True for _ in tuner_layers(module)):
        module._hf_peft_config_loaded = False  # type: ignore[assignment]
