"""Prepare a pipeline for ``torch.compile``, so that no change of its adapters recompiles it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..adapters import AdapterConfig, NoraLayer, lora
from ..adapters.axes import LARGEST, Targets
from ..adapters.tuner.guards import guard, refuse_fused
from ..errors import UserError, quoted
from ..pipelines.components import components as components_of
from ..pipelines.components import (
    denoiser_name,
    named_tuner_layers,
    pick,
    refuse_offloaded,
    refuse_serving,
    targets,
    targets_by_component,
)
from .active import is_prepared, unwrap_empty
from .locking import one_at_a_time


@one_at_a_time
def prepare_for_compile(
    pipe: Any,
    max_rank: int | None = 64,
    target_modules: Targets = None,
    components: str | Sequence[str] | None = None,
) -> None:
    """Give layers a pair of tensors for all adapters they will ever have: ``y = W x + B A x``, ``A [max_rank, d_in]``.

    Call it before or after ``torch.compile``, before the first pass. Loading, activating, weighting, hot-swapping,
    disabling and deleting adapters then write ``B A = sum_k s_k dW_k`` into the pair, and no pass without gradients in
    evaluation mode compiles again. Ranks of live adapters add up; those in one frozen basis of rank ``r`` need ``r``
    together.

    ``target_modules``: as in the presets (default: attention), beside the layers that have adapters now.
    ``components``: default: the denoiser. ``max_rank=None`` removes the preparation.
    Raises :class:`UserError` for targets that match nothing, while weights are offloaded, and if the live adapters need
    more than ``max_rank``; so does every later call that would, and loading an adapter for other layers. Nothing
    changes then.
    """
    if max_rank is not None and (type(max_rank) is not int or not 1 <= max_rank <= LARGEST):
        raise UserError(f"max_rank={quoted(max_rank)} is not a rank: give a whole number from 1 to {LARGEST}, or None")
    names = [components] if isinstance(components, str) else list(components or [denoiser_name(pipe)])
    modules = components_of(pipe)
    chosen = pick(modules, names)
    refuse_serving(modules)
    refuse_offloaded(modules)
    if max_rank is None:
        for module in chosen.values():
            _release(module)
        return
    selected = targets_by_component(chosen, lora(target_modules=target_modules))
    for module in chosen.values():
        refuse_fused(module)
    with torch.inference_mode(False):  # the tensors must stay usable outside of a caller's inference mode
        for name, module in chosen.items():
            _prepare(module, name, selected[name], max_rank)


def _prepare(module: nn.Module, component: str, selected: dict[str, nn.Module], max_rank: int) -> None:
    parents = {child: (parent, name) for parent in module.modules() for name, child in parent.named_children()}
    bare = {layer: parents[layer] for layer in selected.values() if not isinstance(parents[layer][0], NoraLayer)}
    wrapped = [(parent, name, NoraLayer(layer).train(layer.training)) for layer, (parent, name) in bare.items()]
    for parent, name, layer in wrapped:
        setattr(parent, name, layer)
    guard(module)
    layers = _layers(module)
    before = {path: layer.nora_fixed for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            layer.prepare(f"{component}.{path}", max_rank)
    except BaseException:
        for path, layer in layers.items():
            layer.nora_fixed = before[path]
        unwrap_empty(module)
        raise


def _release(module: nn.Module) -> None:
    for layer in _layers(module).values():
        layer.prepare("", None)
    unwrap_empty(module)


def _layers(module: nn.Module) -> dict[str, NoraLayer]:
    """All layers of this toolkit by path, without wrappers."""
    named = named_tuner_layers(module)
    return {path.replace(".base_layer", ""): layer for path, layer in named if isinstance(layer, NoraLayer)}


def refuse_unprepared(module: nn.Module, config: AdapterConfig, name: str) -> None:
    """Raise :class:`UserError` if a prepared model would get a new adapter in layers that are not prepared."""
    prepared = {path for path, layer in _layers(module).items() if is_prepared(layer)}
    outside = [path for path in targets(module, config) if path not in prepared] if prepared else []
    if outside:
        raise UserError(
            f"{name!r} adapts {outside[0]}, for which the {type(module).__name__} was not prepared: call "
            "prepare_for_compile again, with these layers in target_modules"
        )
