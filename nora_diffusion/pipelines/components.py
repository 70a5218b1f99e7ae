"""Components of a pipeline that adapters sit in, and the paths of their projections."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..adapters import AdapterConfig, NoraLayer
from ..adapters.axes import fits
from ..adapters.targets import TARGET_GROUPS
from ..adapters.tuner.mixed_rows import serves_rows
from ..errors import UserError, quoted
from .names import COMPONENTS, DENOISERS

Modules = Mapping[str, nn.Module]
"""Components by name, as :func:`components` returns them."""


def components(pipe: Any) -> dict[str, nn.Module]:
    """The denoiser and the text encoders of a pipeline by name, without the wrapper of ``torch.compile``.

    A public function calls this once and passes the dict, or one of its modules, to its helpers.
    """
    found = {name: getattr(pipe, name, None) for name in COMPONENTS}
    return {name: getattr(module, "_orig_mod", module) for name, module in found.items() if module is not None}


def pick(modules: Modules, names: Iterable[str]) -> dict[str, nn.Module]:
    """The components with these names. Raises :class:`UserError` for a name that the pipeline does not have."""
    names = list(names)
    unknown = [name for name in names if not isinstance(name, str) or name not in modules]
    if unknown:
        raise UserError(f"{quoted(unknown[0])} is not a component of this pipeline: choose one of {', '.join(modules)}")
    return {name: modules[name] for name in names}


def denoiser_name(pipe: Any) -> str:
    """``"unet"`` or ``"transformer"``. Raises :class:`UserError` for a pipeline without a denoiser."""
    for name in DENOISERS:
        if getattr(pipe, name, None) is not None:
            return name
    if isinstance(pipe, nn.Module):
        raise UserError(f"a {type(pipe).__name__} is a single model: pass the pipeline that holds it")
    raise UserError(f"{type(pipe).__name__} has neither a unet nor a transformer: adapters need one of them")


def denoiser(pipe: Any) -> Any:
    """The UNet or the transformer, without the wrapper of ``torch.compile``. Raises as :func:`denoiser_name`."""
    module = getattr(pipe, denoiser_name(pipe))
    return getattr(module, "_orig_mod", module)


def devices(pipe: Any) -> set[torch.device]:
    """The devices of all tensors of a pipeline, VAE included (``pipe.device`` is that of one component)."""
    modules = [module for module in pipe.components.values() if isinstance(module, nn.Module)]
    return {tensor.device for module in modules for tensor in (*module.parameters(), *module.buffers())}


def text_encoders(pipe: Any) -> list[nn.Module]:
    """The text encoders of a pipeline in order, without the wrapper of ``torch.compile``."""
    return [module for name, module in components(pipe).items() if name not in DENOISERS]


def tokenizers(pipe: Any) -> list[Any]:
    """The tokenizers of a pipeline, in the order of their text encoders."""
    names = [tokenizer_name(name) for name in COMPONENTS if name not in DENOISERS]
    return [tokenizer for name in names if (tokenizer := getattr(pipe, name, None)) is not None]


def tokenizer_name(encoder: str) -> str:
    """The pipeline attribute that holds the tokenizer of a text encoder: ``text_encoder_2`` -> ``tokenizer_2``."""
    return encoder.replace("text_encoder", "tokenizer")


def canonical(path: str) -> str:
    """A module path as adapter files write it: without tuner wrappers and CLIP's optional ``text_model.``."""
    return path.replace(".base_layer", "").removeprefix("text_model.")


def projections(module: nn.Module) -> dict[str, nn.Module]:
    """All linear and conv layers by path, without the wrappers of tuner layers (``text_model.`` stays)."""
    found: dict[str, nn.Module] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not _inside_adapter(path):
            found[path.replace(".base_layer", "")] = layer
    return found


def _inside_adapter(path: str) -> bool:
    return any(part.startswith(("nora_", "lora_")) for part in path.split("."))


def targets(module: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The projections that ``config`` selects, by path. Raises :class:`UserError` if it selects none."""
    available = projections(module)
    selected = {path: layer for path, layer in available.items() if config.selects(path)}
    if not selected:
        raise UserError(
            f"target_modules={config.target_modules!r} matches no projection of {type(module).__name__}: "
            f"{_suggest(_target_names(config), available)}"
        )
    return selected


def targets_by_component(modules: Modules, config: AdapterConfig) -> dict[str, dict[str, nn.Module]]:
    """The projections that ``config`` selects in each of these components, by path.

    Raises :class:`UserError` if it selects none in one of them, or if a name in ``target_modules`` or a pattern for
    ranks or alphas matches nothing in any of them.
    """
    selected = {name: targets(module, config) for name, module in modules.items()}
    paths = [path for layers in selected.values() for path in layers]
    grouped = {suffix for group in TARGET_GROUPS.values() for suffix in group}
    for target in config.target_modules if isinstance(config.target_modules, list) else []:
        if target not in grouped and not any(f".{path}".endswith(f".{target}") for path in paths):
            available = [path for module in modules.values() for path in projections(module)]
            raise UserError(
                f"target_modules: no projection of the {', '.join(selected)} is named {target!r}, or it is excluded: "
                f"{_suggest([target], available)}"
            )
    for table in ("rank_pattern", "inner_rank_pattern", "alpha_pattern"):
        unused = next((p for p in getattr(config, table) if not any(fits(p, path) for path in paths)), None)
        if unused is not None:
            raise UserError(f"{table}: {unused!r} matches no adapted projection: {_suggest([unused], paths)}")
    return selected


def _target_names(config: AdapterConfig) -> list[str]:
    names = config.target_modules or []
    return re.findall(r"[A-Za-z]\w+", names) if isinstance(names, str) else list(names)


def _suggest(wanted: Iterable[str], paths: Iterable[str]) -> str:
    """The names most similar to ``wanted``, or else the most common ones."""
    names = Counter(re.sub(r"^.*\.(?=[^.]*[^.\d][^.]*(\.\d+)?$)", "", path) for path in paths)
    similar = [name for word in wanted for name in get_close_matches(word, names, cutoff=0.6)]
    if similar:
        return f"did you mean {', '.join(dict.fromkeys(similar))}?"
    return (
        f"use the groups {', '.join(TARGET_GROUPS)}, or names such as {', '.join(n for n, _ in names.most_common(6))}"
    )


def adapter_configs(module: nn.Module) -> dict[str, Any]:
    """PEFT's configs of a component's adapters by name, those of other tuners included."""
    configs: dict[str, Any] = getattr(module, "peft_config", None) or {}
    return configs


def tuner_layers(module: nn.Module) -> Iterator[BaseTunerLayer]:
    """All PEFT tuner layers of a module, those of other tuners included, in the order of ``named_modules``."""
    return (layer for _, layer in named_tuner_layers(module))


def named_tuner_layers(module: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """:func:`tuner_layers` with their paths."""
    is_tuner: dict[type, bool] = {}  # `isinstance` is slow for abstract classes
    for path, current in _named_frozen_modules(module):
        kind = type(current)
        if kind not in is_tuner:
            is_tuner[kind] = issubclass(kind, BaseTunerLayer)
        if is_tuner[kind]:
            yield path, cast(BaseTunerLayer, current)


def _named_frozen_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules but those inside adapters, in the order of ``named_modules``.

    Ten times as fast as ``named_modules``, which enters the factors of every adapter and builds each path anew at each
    level.
    """
    seen: set[nn.Module] = set()
    stack = [("", module)]
    while stack:
        path, current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        yield path, current
        children = current._modules
        if children:
            inside: Iterable[str] = getattr(type(current), "adapter_layer_names", ())
            prefix = f"{path}." if path else ""
            stack += [
                (prefix + name, child)
                for name, child in reversed(children.items())
                if child is not None and name not in inside
            ]


@contextmanager
def without_adapters(modules: Modules) -> Iterator[None]:
    """Run without adapters; afterwards each layer is enabled or disabled as before. ``requires_grad`` is untouched."""
    layers = [layer for module in modules.values() for layer in tuner_layers(module)]
    before = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            _disable(layer, True)
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            _disable(layer, disabled)


def _disable(layer: BaseTunerLayer, disabled: bool) -> None:
    layer._disable_adapters = disabled  # PEFT's `enable_adapters` would also set requires_grad
    if isinstance(layer, NoraLayer):
        layer.refresh()


def nora_layers(module: nn.Module, adapter_name: str) -> dict[str, NoraLayer]:
    """The layers that hold an adapter, by canonical path."""
    return {
        canonical(path): layer
        for path, layer in named_tuner_layers(module)
        if isinstance(layer, NoraLayer) and adapter_name in layer.nora_delta
    }


def refuse_merged(modules: Modules) -> None:
    """Raise :class:`UserError` if an adapter is merged into base weights, which are about to be read."""
    for name, module in modules.items():
        if any(layer.merged for layer in tuner_layers(module)):
            raise UserError(f"an adapter is fused into the {name}: call unfuse_lora() first")


def refuse_offloaded(modules: Modules) -> None:
    """Raise :class:`UserError` for weights on the meta device, which sequential offloading fills at each call."""
    for name, module in modules.items():
        frozen = (p for _, layer in _named_frozen_modules(module) for p in layer._parameters.values())
        if any(parameter is not None and parameter.is_meta for parameter in frozen):
            raise UserError(
                f"the weights of the {name} are offloaded layer by layer: call pipe.remove_all_hooks() first, and "
                "enable_sequential_cpu_offload() again afterwards"
            )


def refuse_serving(modules: Modules) -> None:
    """Raise :class:`UserError` inside ``mixed_batch``, where adapters cannot be added or removed."""
    if any(serves_rows(module) for module in modules.values()):
        raise UserError("the pipeline is serving a mixed batch: leave that context first")
