"""List adapters, set the active ones and their weights, delete them; ordinary LoRAs included."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..adapters import NoraLayer
from ..adapters.tuner.guards import unguard
from ..adapters.tuner.peft_interface import check_weight, set_active_names
from ..errors import UserError, quoted
from ..pipelines.components import Modules, adapter_configs, components, refuse_serving, tuner_layers
from ..pipelines.router_inputs import connect
from .locking import one_at_a_time
from .tokens import remove_tokens


def active_adapters(module: nn.Module) -> list[str]:
    """Names of the active adapters of one component.

    Each tuner layer has its own list of active names, which may name adapters that only other layers hold; a name
    counts if a layer that lists it also holds the adapter.
    """
    names = [name for layer in tuner_layers(module) for name in layer.active_adapters if name in held(layer)]
    return list(dict.fromkeys(names))


def held(layer: BaseTunerLayer) -> set[str]:
    """Names of the adapters that a tuner layer of any method holds."""
    return {name for table in layer.adapter_layer_names for name in getattr(layer, table)}


def set_active(module: nn.Module, names: Sequence[str]) -> None:
    """Make exactly these adapters active; ``requires_grad`` of adapter parameters stays as it is."""
    for layer in tuner_layers(module):
        set_active_names(layer, names)


@contextmanager
def keeping_trained(module: nn.Module) -> Iterator[None]:
    """Restore ``requires_grad`` of all adapter parameters on exit (PEFT changes it when it activates adapters)."""
    trained = {id(parameter) for parameter in _adapter_parameters(module) if parameter.requires_grad}
    try:
        yield
    finally:
        for parameter in _adapter_parameters(module):
            parameter.requires_grad_(id(parameter) in trained)


def _adapter_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    for layer in tuner_layers(module):
        for name in layer.adapter_layer_names:
            yield from getattr(layer, name).parameters()


def list_adapters(pipe: Any) -> dict[str, list[str]]:
    """Names of all adapters (ordinary LoRAs too) by component."""
    return adapter_names(components(pipe))


def adapter_names(modules: Modules) -> dict[str, list[str]]:
    """Names of all adapters (ordinary LoRAs too) by component; components without any are left out."""
    found = {component: list(adapter_configs(module)) for component, module in modules.items()}
    return {component: names for component, names in found.items() if names}


Weight = float | Mapping[str, Any]


@one_at_a_time
def set_adapters(pipe: Any, names: str | Sequence[str], weights: Weight | Sequence[Weight] = 1.0) -> None:
    """Make exactly these adapters active, with these weights.

    A weight is a number or, as in diffusers' ``pipe.set_adapters``, a dict by component and block:
    ``{"unet": {"down": 0.5, "up": {"block_1": 1.0}}, "text_encoder": 0.3}``. Raises :class:`UserError` for an unknown
    name and for a weight that is not a number from -100 to 100; nothing changes then.
    """
    if not isinstance(names, Iterable) or _is_scalar(names):
        raise UserError(f"set_adapters takes a name or a list of names, not {quoted(names)}")
    names = [names] if isinstance(names, str) else list(names)
    weights = per_entry(weights, len(names))
    if len(weights) != len(names):
        raise UserError(f"{len(names)} adapters but {len(weights)} weights: give one weight per adapter")
    modules = components(pipe)
    for name in names:
        require_adapter(modules, name)
    if len(set(names)) < len(names):
        raise UserError(f"{max(names, key=names.count)!r} is listed twice: list it once, with its weight")
    checked = [_check_weights(modules, name, weight) for name, weight in zip(names, weights, strict=True)]
    with undone_on_error(modules):
        for component, module in modules.items():
            own = [weight.get(component, 1.0) if isinstance(weight, Mapping) else weight for weight in checked]
            if any(isinstance(weight, Mapping) for weight in own):
                _set_block_weights(component, module, names, own)
            else:
                _set_weights(module, names, own)


def per_entry(weights: Any, count: int) -> list[Any]:
    """One weight for each of ``count`` entries; a single number or dict applies to all."""
    if isinstance(weights, str | bytes | Mapping) or not isinstance(weights, Iterable) or _is_scalar(weights):
        return [weights] * count
    return list(weights)


def _is_scalar(weight: Any) -> bool:
    """Whether it is a tensor or array without dimensions, which claims to be iterable."""
    return getattr(weight, "shape", None) == ()


@contextmanager
def undone_on_error(modules: Modules) -> Iterator[None]:
    """After any error, give every layer its active adapters and weights back."""
    layers = [layer for module in modules.values() for layer in tuner_layers(module)]
    before = [(layer, list(layer.active_adapters), _scaling_of(layer)) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, active, scaling in before:
            restore_weights(layer, active, scaling)
        raise


def _scaling_of(layer: Any) -> dict[str, float]:
    """The scaling of each adapter of a tuner layer of any method."""
    if isinstance(layer, NoraLayer):
        return {name: state.scaling for name, state in layer.states.items()}
    return dict(getattr(layer, "scaling", {}))


def restore_weights(layer: Any, active: list[str], scaling: Mapping[str, float]) -> None:
    """Set the active adapters and the scaling of a tuner layer of any method."""
    layer._active_adapter = active
    for name, value in scaling.items():
        if isinstance(layer, NoraLayer):
            layer.states[name].rescale(value)
        elif name in layer.scaling:
            layer.scaling[name] = value
    if isinstance(layer, NoraLayer):
        layer.refresh()


def _check_weights(modules: Modules, name: str, weight: Any) -> Any:
    """The weight, or the weights by component and block, in Python's own numbers."""
    if not isinstance(weight, Mapping):
        return check_weight(name, weight)
    _check_keys(f"the weights of {name!r}", weight, list(modules))
    return {
        component: _check_blocks(name, component, modules[component], own)
        if isinstance(own, Mapping)
        else check_weight(name, own)
        for component, own in weight.items()
    }


def _check_blocks(name: str, component: str, module: Any, weights: Mapping[str, Any]) -> Any:
    """Check weights by block; for a UNet the names of blocks too, because diffusers ignores unknown ones."""
    if hasattr(module, "down_blocks") and hasattr(module, "up_blocks"):
        _check_keys(f"the {component} weights of {name!r}", weights, ("down", "mid", "up"))
        for side, own in weights.items():
            if isinstance(own, Mapping):
                blocks = getattr(module, f"{side}_blocks", ())
                known = [f"block_{i}" for i, block in enumerate(blocks) if hasattr(block, "attentions")]
                _check_keys(f"the {component} {side} weights of {name!r}", own, known)
    return _checked_numbers(name, weights)


def _checked_numbers(name: str, weights: Any) -> Any:
    if isinstance(weights, Mapping):
        return {key: _checked_numbers(name, own) for key, own in weights.items()}
    if isinstance(weights, list | tuple):
        return [_checked_numbers(name, own) for own in weights]
    return check_weight(name, weights)


def _check_keys(what: str, weights: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = next((key for key in weights if key not in known), None)
    if unknown is not None or not weights:
        problem = f"{unknown!r} is unknown in {what}" if weights else f"{what} are empty"
        raise UserError(f"{problem}: " + (f"use {', '.join(known)}" if known else "give one number instead"))


def _set_weights(module: nn.Module, names: list[str], weights: list[Any]) -> None:
    chosen = dict(zip(names, weights, strict=True))
    for layer in tuner_layers(module):
        if isinstance(layer, NoraLayer):
            layer.set_weights(chosen)
        else:
            layer._active_adapter = list(names)
            for name, weight in chosen.items():
                layer.set_scale(name, weight)


def _set_block_weights(component: str, module: Any, names: list[str], weights: list[Any]) -> None:
    if not hasattr(module, "set_adapters"):
        raise UserError(f"the {component} does not support weights by block: give one number per adapter")
    try:
        with keeping_trained(module):
            module.set_adapters(names, weights)
    except UserError:
        raise
    except (LookupError, ValueError, TypeError) as error:
        raise UserError(f"diffusers refuses the {component} weights by block: {error}") from error


def unknown_adapter(modules: Modules, name: str) -> UserError:
    """The error for an unknown adapter name; it lists the known ones."""
    known = ", ".join(sorted(_names(modules))) or "none"
    return UserError(f"there is no adapter named {quoted(name)} in the pipeline: it has {known}")


def require_adapter(modules: Modules, name: str) -> None:
    """Raise :class:`UserError` unless some component has an adapter of this name, ours or an ordinary LoRA."""
    if not isinstance(name, str) or name not in _names(modules):
        raise unknown_adapter(modules, name)


def _names(modules: Modules) -> set[str]:
    return {name for names in adapter_names(modules).values() for name in names}


@one_at_a_time
def delete_adapter(pipe: Any, adapter_name: str) -> None:
    """Remove an adapter and its new tokens from all components, and the wrappers of layers without any adapter left.

    The set of other active adapters does not change. Raises :class:`UserError` for an unknown name, inside
    ``mixed_batch``, and for an ordinary LoRA that is fused.
    """
    modules = components(pipe)
    require_adapter(modules, adapter_name)
    refuse_serving(modules)
    _refuse_foreign_fused(modules, adapter_name)
    remove_tokens(pipe, modules, adapter_name)
    eject(modules.values(), adapter_name)
    declare_components(pipe, modules)


def eject(modules: Iterable[nn.Module], adapter_name: str) -> None:
    """Remove an adapter, but not its new tokens, from these components."""
    for module in modules:
        layers = list(tuner_layers(module))
        # PEFT stores the config after injection: if that fails, layers hold an adapter without a config.
        if adapter_name in adapter_configs(module) or any(adapter_name in held(layer) for layer in layers):
            others = [name for name in active_adapters(module) if name != adapter_name]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".* was active which is now deleted")
                for layer in layers:
                    layer.delete_adapter(adapter_name)
            if active_adapters(module) != others:
                set_active(module, others)
            adapter_configs(module).pop(adapter_name, None)
        unwrap_empty(module)
        connect(module)
        refresh_group_offloading(module)


def declare_components(pipe: Any, modules: Modules) -> None:
    """Let diffusers' own functions (``pipe.set_adapters``, ``disable_lora`` ...) reach every component with adapters.

    They skip a T5, which their LoRA loaders do not support.
    """
    known = getattr(type(pipe), "_lora_loadable_modules", None)
    if known is not None:
        vars(pipe).pop("_lora_loadable_modules", None)
        others = [component for component in adapter_names(modules) if component not in known]
        if others:
            pipe._lora_loadable_modules = [*known, *others]


def refresh_group_offloading(module: nn.Module) -> None:
    """Update diffusers' group offloading, if it is on, after parameters were added or removed."""
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

    _maybe_remove_and_reapply_group_offloading(module)


def _refuse_foreign_fused(modules: Modules, adapter_name: str) -> None:
    layers = (layer for module in modules.values() for layer in tuner_layers(module))
    if any(adapter_name in layer.merged_adapters and not isinstance(layer, NoraLayer) for layer in layers):
        raise UserError(f"{adapter_name!r} is a LoRA that is fused into the weights: call unfuse_lora() first")


def unwrap_empty(module: nn.Module) -> None:
    """Replace tuner layers of any method that hold no adapter by their base layers, unless they are prepared for some.

    diffusers' own functions leave such layers, whose keys would spoil a saved folder. Without any tuner layer left, the
    module is as it was before its first adapter.
    """
    for parent in list(module.modules()):
        for child_name, child in list(parent.named_children()):
            while isinstance(child, BaseTunerLayer) and not held(child) and not is_prepared(child):
                child = child.base_layer
                setattr(parent, child_name, child)
    layers = list(tuner_layers(module))
    if not layers:
        unguard(module)
    if not any(map(held, layers)):
        module._hf_peft_config_loaded = False  # type: ignore[assignment]


def is_prepared(layer: nn.Module) -> bool:
    """Whether a layer is prepared for ``torch.compile`` (:func:`.compiling.prepare_for_compile`)."""
    return isinstance(layer, NoraLayer) and layer.nora_fixed is not None
