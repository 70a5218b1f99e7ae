"""The adapters that go into a mix: read from a pipeline or from their files into one form."""

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
from ..formats.adapter_file import AdapterInfo, given_name, inspect_adapter, read_tensors
from ..formats.keys import Projection, factors_by_projection
from ..loaders.active import held, unknown_adapter
from ..loaders.inject import origin
from ..pipelines.components import Modules, adapter_configs, canonical, nora_layers, same_weights
from .updates import Update, chain_update, lora_update


@dataclass
class Source:
    """One adapter: its updates, the configs of its components (none for an ordinary LoRA), what its file says."""

    name: str
    updates: dict[Projection, Update]
    configs: dict[str, AdapterConfig] = field(default_factory=dict)
    info: AdapterInfo | None = None


def loaded_source(modules: Modules, name: str) -> Source:
    """An adapter of a pipeline, ours or an ordinary LoRA. Raises :class:`UserError` where it has no ``dW`` to mix."""
    source = Source(name, {}, info=origin(modules, name))
    for part, module in modules.items():
        config = adapter_configs(module).get(name)
        if isinstance(config, AdapterConfig):
            refuse_routed(config, repr(name))
            source.configs[part] = config
            for path, layer in nora_layers(module, name).items():
                source.updates[part, path] = chain_update(
                    layer.delta(name), layer.states[name].native_scale, repr(name)
                )
        elif config is not None:
            source.updates |= {(part, path): update for path, update in _foreign(module, name).items()}
    if not source.updates:
        raise unknown_adapter(modules, name)
    return source


def _foreign(module: nn.Module, name: str) -> dict[str, Update]:
    """The updates of a plain LoRA, which wraps our layers where both are there."""
    found = {}
    for path, layer in module.named_modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            found[canonical(path)] = lora_update(layer, name)
        elif isinstance(layer, BaseTunerLayer) and name in held(layer):
            raise UserError(f"{name!r} has a {type(layer).__name__} at {path}: only plain LoRA layers can be mixed")
    return found


def file_source(path: str | Path, basis_dir: str | Path | None = None) -> Source:
    """An adapter file, without its base. Raises :class:`UserError` where it is damaged or has no ``dW`` to mix."""
    info = inspect_adapter(path)
    source = Source(given_name(info.path), {}, info.configs, info)
    for (component, path_in), factors in factors_by_projection(read_tensors(info, basis_dir)).items():
        config = source.configs[component]
        refuse_routed(config, info.path)
        delta = delta_of_file(config, path_in, factors, info.shapes.get(f"{component}.{path_in}"))
        source.updates[component, path_in] = chain_update(delta, config.scale_for(path_in), info.path)
    return source


def refuse_routed(config: AdapterConfig, owner: str) -> None:
    """A routed adapter (MoR) has no one ``dW``."""
    if config.router != "none":
        raise UserError(
            f"{owner} is a routed adapter ({config.method}): its update depends on its input, so there is no one dW to "
            "mix or compare; keep it active beside the others with set_adapters"
        )


def check_same_base(sources: Sequence[Source]) -> None:
    """Refuse adapters whose files name different weights, by the fingerprints of the projections both adapt."""
    infos = [source.info for source in sources if source.info is not None]
    for other in infos[1:]:
        mine, theirs = infos[0].fingerprints, other.fingerprints
        common = mine.keys() & theirs.keys()
        same = same_weights(mine, {key: theirs[key] for key in common}) if common else infos[0].base == other.base
        if not same:
            raise UserError(
                f"{infos[0].path} was made for the base {infos[0].base} and {other.path} for {other.base}: "
                "adapters of different bases cannot be mixed"
            )
