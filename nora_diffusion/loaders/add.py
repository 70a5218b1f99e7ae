"""Add a new adapter to a pipeline, ready to train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import AdapterConfig
from ..adapters.config import Start
from ..errors import UserError, quoted
from ..formats.keys import file_key
from ..pipelines.basis_cache import outer_pairs
from ..pipelines.calibration import Calibration, Strengths, activation_strengths
from ..pipelines.components import components as components_of
from ..pipelines.components import (
    denoiser_name,
    nora_layers,
    pick,
    refuse_merged,
    refuse_offloaded,
    refuse_serving,
    targets_by_component,
)
from ..pipelines.router_inputs import router_for
from .active import active_adapters, set_active
from .inject import all_or_nothing, check_new_name, check_path, inject, refuse_whole_modules, tie
from .locking import one_at_a_time
from .sharing import Pairs, pairs_from
from .tokens import token_parameters


@one_at_a_time
def add_adapter(
    pipe: Any,
    config: AdapterConfig,
    adapter_name: str = "default",
    components: str | Sequence[str] | None = None,
    calibration: Calibration | Sequence[str] | None = None,
    basis_from: str | Path | Pairs | None = None,
) -> None:
    """Add a new adapter to a pipeline. It starts as an exact no-op and is active, beside those that were active before.

    Its factors are the only parameters of these components that require gradients.

    ``components``: component names such as unet, transformer or text_encoder (default: the denoiser). ``calibration``:
    inputs for the activation statistics of ``awsvd``, as prompts or as a :class:`Calibration` with images of a subject
    (default: generic prompts, so that subjects can share the basis). ``basis_from``: an adapter file whose frozen
    outer pairs are copied instead of computing them (:func:`.sharing.pairs_from`), or the pairs themselves.
    Raises :class:`UserError` for a name that is taken or invalid, while an adapter is fused or weights are offloaded,
    and for targets or a basis that do not fit.
    """
    if not isinstance(config, AdapterConfig):
        raise UserError(f"{quoted(config)} is not a config of this toolkit: make one with nora(), lora() ...")
    refuse_whole_modules(config)
    if basis_from is not None and not isinstance(basis_from, Mapping):
        check_path("basis_from", basis_from)
    if components is not None and not isinstance(components, str | Sequence):
        raise UserError(f"components={quoted(components)} is not a list of component names")
    names = [components] if isinstance(components, str) else list(components or [denoiser_name(pipe)])
    modules = components_of(pipe)
    check_new_name(pipe, modules, adapter_name, names)
    chosen = pick(modules, names)
    refuse_merged(modules)
    refuse_offloaded(modules)
    refuse_serving(modules)
    layers = targets_by_component(chosen, config)
    copied = _copied(pipe, config, layers, basis_from)
    strengths: Strengths = {}
    if config.basis == "awsvd" and copied is None:
        if calibration is not None and not isinstance(calibration, Calibration):
            calibration = Calibration(calibration)
        strengths = activation_strengths(pipe, calibration)
    for name in names:
        unused = set(layers[name]) - set(strengths.get(name, layers[name]))
        if unused:
            raise UserError(f"{sorted(unused)[0]!r} was never called during calibration: exclude it or use basis='svd'")
    with all_or_nothing(pipe, modules, adapter_name):
        for name, module in chosen.items():
            measured = strengths.get(name, {})
            pairs = outer_pairs(config, layers[name], measured) if copied is None else copied[name]
            start = Start(measured, dict(pairs))
            before = active_adapters(module)
            inject(module, router_for(config, name), adapter_name, start)
            for layer in nora_layers(module, adapter_name).values():
                tie(layer, adapter_name)
            set_active(module, [*before, adapter_name])
            _train(module, adapter_name)


def _copied(
    pipe: Any,
    config: AdapterConfig,
    layers: Mapping[str, Mapping[str, nn.Module]],
    basis_from: str | Path | Pairs | None,
) -> Pairs | None:
    """Outer pairs that are given: those of a file, or pairs rounded to the config's ``basis_dtype``."""
    if basis_from is None:
        return None
    if not isinstance(basis_from, Mapping):
        return pairs_from(pipe, basis_from, config, layers)
    dtype = getattr(torch, config.basis_dtype)
    given: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for name, own in layers.items():
        pairs: Any = basis_from.get(name)
        given[name] = {}
        for path in own:
            pair = pairs.get(path) if isinstance(pairs, Mapping) else None
            if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(factor, Tensor) for factor in pair)):
                raise UserError(f"basis_from has no pair of tensors (A_out, B_out) for {name}.{path}")
            given[name][path] = (pair[0].to(dtype), pair[1].to(dtype))
    return given


def _train(module: nn.Module, name: str) -> None:
    """Make the factors of this adapter, in fp32, the only parameters that require gradients."""
    module.requires_grad_(False)
    for layer in nora_layers(module, name).values():
        for parameter in layer.delta(name).parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def trainable_parameters(pipe: Any, adapter_name: str = "default") -> dict[str, nn.Parameter]:
    """The trained factors of an adapter and the embeddings of its new tokens, by their key in the adapter file."""
    modules = components_of(pipe)
    factors = {
        file_key(name, path, factor): parameter
        for name, module in modules.items()
        for path, layer in nora_layers(module, adapter_name).items()
        for factor, parameter in layer.delta(adapter_name).named_parameters()
    }
    return factors | token_parameters(modules, adapter_name)
