"""The adapter of a run: its config, the components that it adapts, and adding it to the pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...adapters import AdapterConfig, in_blocks
from ...adapters.deltas.bases import Pair
from ...adapters.patterns import pattern_of
from ...adapters.presets import PRESETS
from ...adapters.shapes import outer_rank
from ...adapters.tuner.build import flat_weight
from ...errors import UserError
from ...formats.adapter_file import inspect_adapter
from ...formats.hub import locate
from ...loaders import add_adapter, check_adapter, delete_adapter, load_adapter, pairs_from, trainable_parameters
from ...pipelines.calibration import Calibration
from ...pipelines.components import (
    adapter_configs,
    canonical,
    components,
    denoiser_name,
    nora_layers,
    pick,
    targets_by_component,
)
from ..data.tokens import add_new_tokens
from ..settings.config import TrainConfig
from ..settings.methods import parameters_of
from ..settings.rank_allocations import STARTS
from ..settings.resolved import ResolvedConfig
from ..settings.values import suggestion
from ..step.denoiser import TRAINED_ENCODERS, family_of, networks
from ..step.seeds import derive
from .starting_ranks import starting_config


def adapter_config(config: TrainConfig) -> AdapterConfig:
    """Call the preset of ``config.method`` with the settings that it accepts.

    The adapter of a chain has the ranks of all its links, at the scale ``alpha / r`` of one.
    """
    if config.gates_of is not None:
        return gated_config(config.gates_of)
    targets: str | list[str] | None = config.target_modules
    if targets is not None and len(targets) == 1:
        targets = targets[0]  # a group, or a regular expression
    if config.target_blocks:
        targets = in_blocks(config.target_blocks, targets)
    values = {parameter: getattr(config, name) for name, parameter in parameters_of(config.method).items()}
    values["target_modules"] = targets
    if config.strategy == "chain":
        values |= _ranks_of_chain(values, config.chain_links or 1)
    return PRESETS[config.method](**{name: value for name, value in values.items() if value is not None})


def gated_config(path: str) -> AdapterConfig:
    """The config of a mixture of frozen adapters. Raises :class:`UserError` for any other adapter."""
    info = inspect_adapter(path, hashed=False)
    if any(config.experts != "frozen" for config in info.configs.values()):
        raise UserError(f"--gates_of {path} has no gates over frozen adapters: mix some with --mode gated")
    return next(iter(info.configs.values()))


def _ranks_of_chain(values: Mapping[str, Any], links: int) -> dict[str, Any]:
    if "inner_r" in values:
        return {"inner_r": links * values["inner_r"]}
    alpha = values["alpha"]
    return {"r": links * values["r"], "alpha": None if alpha is None else links * alpha}


def starting_adapter(config: TrainConfig, components: Mapping[str, nn.Module]) -> AdapterConfig:
    """The config of the adapter as it starts: with more ranks than at the end, for some rank allocations."""
    adapter = adapter_config(config)
    start = STARTS.get(config.rank_allocation)
    if start is None:
        return adapter
    targets = targets_by_component(components, adapter)
    return starting_config(adapter, start, {name: list(layers) for name, layers in targets.items()})


def adapted_components(config: TrainConfig, pipe: Any) -> dict[str, nn.Module]:
    """Adapted components by name; the denoiser comes first."""
    encoders = TRAINED_ENCODERS[family_of(pipe)] if config.train_text_encoder else ()
    return pick(components(pipe), (denoiser_name(pipe), *encoders))


def check_targets(config: ResolvedConfig, pipe: Any, components: Mapping[str, nn.Module]) -> None:
    """Check that the adapter can be built and has targets. Raises :class:`UserError`; nothing is written."""
    paths = [path for module in components.values() for path, _ in module.named_modules()]
    for block in config.target_blocks or ():
        if not {block, f"text_model.{block}"} & {*paths}:
            raise UserError(f"--target_blocks: the base has no {block!r}{suggestion(block, paths)}")
    adapter = adapter_config(config)
    targets = targets_by_component(components, adapter)
    for layers in targets.values():
        for path, layer in layers.items():
            outer_rank(adapter, flat_weight(layer).shape, path)  # refuses blocks that do not divide a layer
    if config.basis_from is not None:
        pairs_from(pipe, config.basis_from, adapter, targets)
    if config.start_from is not None:
        check_start(config, pipe, list(components))


SAME = (
    "method", "r", "inner_r", "alpha", "core", "blocks", "rank_mask", "rank_scales", "magnitude", "router",
    "num_experts", "experts",
)  # fmt: skip
"""Axes in which an adapter must agree with the settings to be trained on."""


def check_start(config: ResolvedConfig, pipe: Any, components: Sequence[str]) -> None:
    """Check that the adapter ``config.start_from`` fits the base and the settings. Raises :class:`UserError`."""
    info, _ = check_adapter(pipe, locate(config.start_from or ""))
    flag, wanted = f"--start_from {config.start_from}", adapter_config(config)
    if list(info.components) != list(components):
        raise UserError(
            f"{flag} has layers in {', '.join(info.components)}, this run trains {', '.join(components)}: give or "
            "leave out --train_text_encoder"
        )
    if info.tokens:
        raise UserError(f"{flag} has new tokens ({', '.join(info.tokens)}), whose training cannot be continued")
    for found in info.configs.values():
        for name in SAME:
            if getattr(found, name) != getattr(wanted, name):
                raise UserError(
                    f"{flag} has {name}={getattr(found, name)}, the settings say {getattr(wanted, name)}: set them to "
                    "the adapter's"
                )


def add_start_adapter(
    config: ResolvedConfig, pipe: Any, components: Mapping[str, nn.Module], name: str
) -> dict[str, nn.Parameter]:
    """Load the adapter ``config.start_from`` to train it on; as :func:`add_new_adapter`."""
    load_adapter(pipe, str(config.start_from), name)
    for module in components.values():
        adapter_configs(module)[name].dropout = config.dropout
        for layer in nora_layers(module, name).values():
            layer.delta(name).dropout.p = config.dropout
    return trained_parameters(pipe, name)


def add_new_adapter(
    config: ResolvedConfig,
    pipe: Any,
    components: Mapping[str, nn.Module],
    name: str,
    calibration: Calibration | None,
    new_tokens: Mapping[str, str | None],
) -> dict[str, nn.Parameter]:
    """Add a new adapter and its tokens to the pipeline; return its trained parameters by file key."""
    if config.gates_of is not None:
        return load_checkpoint_adapter(pipe, name, config.gates_of)
    add_seeded_adapter(config, pipe, components, name, calibration)
    add_new_tokens(config, pipe, name, new_tokens)
    return trained_parameters(pipe, name)


def replace_adapter(
    config: ResolvedConfig,
    pipe: Any,
    components: Mapping[str, nn.Module],
    name: str,
    ranks: Mapping[str, int],
    new_tokens: Mapping[str, str | None],
) -> dict[str, nn.Parameter]:
    """Replace a new adapter by one on the same outer pairs with these inner ranks by path; as :func:`add_new_adapter`.

    Its random factors follow from the run's seed as well.
    """
    uniform = adapter_config(config)
    pattern = {pattern_of(path): rank for path, rank in ranks.items() if rank != uniform.inner_r}
    deltas = {component: nora_layers(module, name) for component, module in components.items()}
    pairs = {
        component: {path: _outer_pair(deltas[component][canonical(path)].delta(name)) for path in layers}
        for component, layers in targets_by_component(components, uniform).items()
    }
    delete_adapter(pipe, name)
    torch.manual_seed(derive(config.seed, "init"))
    add_adapter(pipe, replace(uniform, inner_rank_pattern=pattern), name, list(components), basis_from=pairs)
    add_new_tokens(config, pipe, name, new_tokens)
    return trained_parameters(pipe, name)


def _outer_pair(delta: Any) -> Pair:
    down, up = delta.stored_outer
    return down.detach(), up.detach()


def add_seeded_adapter(
    config: TrainConfig,
    pipe: Any,
    components: Mapping[str, nn.Module],
    name: str,
    calibration: Calibration | None = None,
) -> None:
    """Add a new adapter whose random factors follow from the run's seed."""
    assert config.seed is not None
    torch.manual_seed(derive(config.seed, "init"))
    add_adapter(pipe, starting_adapter(config, components), name, list(components), calibration, config.basis_from)


def load_checkpoint_adapter(pipe: Any, name: str, path: Any) -> dict[str, nn.Parameter]:
    """Load the adapter of a checkpoint into the pipeline; return its trained parameters by file key."""
    load_adapter(pipe, path, name)
    return trained_parameters(pipe, name)


def trained_parameters(pipe: Any, name: str) -> dict[str, nn.Parameter]:
    """Set ``requires_grad`` on the trained parameters of an adapter; return them by file key."""
    parameters = trainable_parameters(pipe, name)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters


def frozen_factors(pipe: Any) -> list[torch.Tensor]:
    """The frozen factors of all adapters in a pipeline."""
    buffers = (item for module in networks(pipe) for item in module.named_buffers())
    return [buffer for name, buffer in buffers if ".nora_" in name]


@torch.no_grad()
def broadcast_factors(pipe: Any, parameters: Mapping[str, nn.Parameter]) -> None:
    """Broadcast all factors from rank 0: an SVD on another process may return other signs."""
    for value in (*parameters.values(), *frozen_factors(pipe)):
        buffer = value.detach().contiguous()
        torch.distributed.broadcast(buffer, src=0)
        value.copy_(buffer)
