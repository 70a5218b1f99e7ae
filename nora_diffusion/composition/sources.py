"""The adapters of a mix, read from a pipeline or from files into a common form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..adapters import AdapterConfig
from ..adapters.tuner.build import delta_of_file
from ..errors import UserError
from ..formats.adapter_file import given_name, inspect_adapter, read_tensors
from ..formats.adapter_info import AdapterInfo
from ..formats.keys import Projection, factors_by_projection
from ..loaders.active import held, unknown_adapter
from ..loaders.inject import origin
from ..pipelines.components import Modules, adapter_configs, canonical, nora_layers
from ..pipelines.fingerprints import same_weights
from .updates import Update, chain_update, lora_update


@dataclass
class Source:
    """One adapter: its updates, the config of each component (none for a plain LoRA) and its file's metadata."""

    name: str
    updates: dict[Projection, Update]
    configs: dict[str, AdapterConfig] = field(default_factory=dict)
    info: AdapterInfo | None = None


def loaded_source(modules: Modules, name: str) -> Source:
    """An adapter of a pipeline, ours or a plain LoRA. Raises :class:`UserError` if it is unknown or has no ``dW``."""
    source = Source(name, {}, info=origin(modules, name))
    for component, module in modules.items():
        config = adapter_configs(module).get(name)
        if isinstance(config, AdapterConfig):
            refuse_routed(config, repr(name))
            source.configs[component] = config
            for path, layer in nora_layers(module, name).items():
                source.updates[component, path] = chain_update(
                    layer.delta(name), layer.states[name].native_scale, repr(name)
                )
        elif config is not None:
            source.updates |= {(component, path): update for path, update in _lora_updates(module, name).items()}
    if not source.updates:
        raise unknown_adapter(modules, name)
    return source


def _lora_updates(module: nn.Module, name: str) -> dict[str, Update]:
    """The updates of a plain LoRA by path. Its layers may wrap ours."""
    found = {}
    for path, layer in module.named_modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            found[canonical(path)] = lora_update(layer, name)
        elif isinstance(layer, BaseTunerLayer) and name in held(layer):
            raise UserError(f"{name!r} has a {type(layer).__name__} at {path}: only plain LoRA layers can be mixed")
    return found


def file_source(path: str | Path, basis_dir: str | Path | None = None) -> Source:
    """An adapter file, without its base. Raises :class:`UserError` if it is damaged or has no ``dW``."""
    info = inspect_adapter(path)
    source = Source(given_name(info.path), {}, info.configs, info)
    for (component, module_path), factors in factors_by_projection(read_tensors(info, basis_dir)).items():
        config = source.configs[component]
        refuse_routed(config, info.path)
        delta = delta_of_file(config, module_path, factors, info.shapes.get(f"{component}.{module_path}"))
        source.updates[component, module_path] = chain_update(delta, config.scale_for(module_path), info.path)
    return source


def refuse_routed(config: AdapterConfig, owner: str) -> None:
    """Raise :class:`UserError` for a routed adapter (MoR), which has no single ``dW``."""
    if config.router != "none":
        raise UserError(
            f"{owner} is a routed adapter ({config.method}): its update depends on its input, so it has no single dW "
            "to mix or compare; activate it beside the others with set_adapters instead"
        )


def check_same_base(sources: Sequence[Source]) -> None:
    """Raise :class:`UserError` for adapters of different bases: by the fingerprints of projections that both adapt."""
    infos = [source.info for source in sources if source.info is not None]
    for other in infos[1:]:
        first, second = infos[0].fingerprints, other.fingerprints
        common = first.keys() & second.keys()
        same = same_weights(first, {key: second[key] for key in common}) if common else infos[0].base == other.base
        if not same:
            raise UserError(
                f"{infos[0].path} was made for the base {infos[0].base} and {other.path} for {other.base}: "
                "adapters of different bases cannot be mixed"
            )
