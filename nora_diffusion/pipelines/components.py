"""The parts of a pipeline that adapters sit in, and the paths of their projections."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn

from ..adapters import AdapterConfig, NoraLayer
from ..adapters.config import fits
from ..adapters.targets import TARGET_GROUPS
from ..errors import UserError

FINGERPRINT_TOLERANCE = 1e-2
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def denoiser_name(pipe: Any) -> str:
    """``"unet"`` or ``"transformer"``, whichever the pipeline has."""
    for name in ("unet", "transformer"):
        if getattr(pipe, name, None) is not None:
            return name
    if isinstance(pipe, nn.Module):
        raise UserError(f"a {type(pipe).__name__} is one model: give the pipeline that holds it")
    raise UserError(f"{type(pipe).__name__} has neither a unet nor a transformer: adapters need one of them")


def component(pipe: Any, name: str) -> nn.Module:
    """One adaptable part of a pipeline, without the wrapper of ``torch.compile``.

    Raises :class:`UserError` that lists those there are.
    """
    module = getattr(pipe, name, None) if name in COMPONENTS else None
    if module is None:
        raise UserError(f"{name!r} is no part of {type(pipe).__name__}: choose among {', '.join(present(pipe))}")
    return getattr(module, "_orig_mod", module)


def present(pipe: Any) -> list[str]:
    """Names of the adaptable parts that this pipeline has."""
    return [name for name in COMPONENTS if getattr(pipe, name, None) is not None]


def denoiser_dtype(pipe: Any) -> torch.dtype:
    """The number type of the denoiser's weights."""
    model: Any = component(pipe, denoiser_name(pipe))
    dtype: torch.dtype = model.dtype
    return dtype


def devices(pipe: Any) -> set[torch.device]:
    """Where the tensors of a pipeline lie, those of the VAE too; ``pipe.device`` is that of one part."""
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return {tensor.device for module in modules for tensor in (*module.parameters(), *module.buffers())}


def text_encoders(pipe: Any) -> list[nn.Module]:
    """All text encoders of a pipeline, the first one first, without the wrapper of ``torch.compile``."""
    return [component(pipe, name) for name in present(pipe) if name.startswith("text_encoder")]


def tokenizers(pipe: Any) -> list[Any]:
    """All tokenizers of a pipeline, in the order of their text encoders."""
    names = [tokenizer_name(name) for name in COMPONENTS if name.startswith("text_encoder")]
    return [tokenizer for name in names if (tokenizer := getattr(pipe, name, None)) is not None]


def tokenizer_name(encoder: str) -> str:
    """What pipelines call the tokenizer of a text encoder."""
    return encoder.replace("text_encoder", "tokenizer")


def canonical(path: str) -> str:
    """A module path as files write it: without tuner wrappers and without CLIP's optional ``text_model.``."""
    return path.replace(".base_layer", "").removeprefix("text_model.")


def projections(module: nn.Module) -> dict[str, nn.Module]:
    """Every linear and conv layer by its clean path (wrappers of tuner layers stripped, ``text_model.`` kept)."""
    found: dict[str, nn.Module] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not _inside_adapter(path):
            found[path.replace(".base_layer", "")] = layer
    return found


def _inside_adapter(path: str) -> bool:
    return any(part.startswith(("nora_", "lora_")) for part in path.split("."))


def targets(module: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The projections that ``config`` picks, by path. Raises :class:`UserError` when it picks none."""
    available = projections(module)
    picked = {path: layer for path, layer in available.items() if _matches(config, path)}
    if not picked:
        raise UserError(
            f"target_modules={config.target_modules!r} matches no projection of {type(module).__name__}: "
            f"{_names_there(_wanted(config), available)}"
        )
    return picked


def all_targets(pipe: Any, names: Iterable[str], config: AdapterConfig) -> dict[str, dict[str, nn.Module]]:
    """The projections that ``config`` picks in each of these components, by path.

    Raises :class:`UserError` when it picks none in one of them, or names a module, or has a pattern for ranks, that is
    in none of them.
    """
    picked = {name: targets(component(pipe, name), config) for name in names}
    paths = [path for group in picked.values() for path in group]
    members = {suffix for group in TARGET_GROUPS.values() for suffix in group}
    for wanted in config.target_modules if isinstance(config.target_modules, list) else []:
        if wanted not in members and not any(f".{path}".endswith(f".{wanted}") for path in paths):
            available = [path for name in picked for path in projections(component(pipe, name))]
            raise UserError(
                f"target_modules: no projection of the {', '.join(picked)} is named {wanted!r}, or it is excluded: "
                f"{_names_there([wanted], available)}"
            )
    for table in ("rank_pattern", "alpha_pattern"):
        unused = next((p for p in getattr(config, table) if not any(fits(p, path) for path in paths)), None)
        if unused is not None:
            raise UserError(f"{table}: {unused!r} matches no adapted projection: {_names_there([unused], paths)}")
    return picked


def _wanted(config: AdapterConfig) -> list[str]:
    names = config.target_modules or []
    return re.findall(r"[A-Za-z]\w+", names) if isinstance(names, str) else list(names)


def _names_there(wanted: Iterable[str], paths: Iterable[str]) -> str:
    """What the caller may have meant: the names most like ``wanted``, or else the commonest."""
    short = Counter(re.sub(r"^.*\.(?=[^.]*[^.\d][^.]*(\.\d+)?$)", "", path) for path in paths)
    near = [name for word in wanted for name in get_close_matches(word, short, cutoff=0.6)]
    if near:
        return f"did you mean {', '.join(dict.fromkeys(near))}?"
    return (
        f"use the groups {', '.join(TARGET_GROUPS)}, or names such as {', '.join(n for n, _ in short.most_common(6))}"
    )


def _matches(config: AdapterConfig, path: str) -> bool:
    return bool(check_target_module_exists(config, path))


def adapter_configs(module: nn.Module) -> dict[str, Any]:
    """PEFT's configs of a component's adapters by name, foreign ones too."""
    configs: dict[str, Any] = getattr(module, "peft_config", None) or {}
    return configs


def tuner_layers(module: nn.Module) -> Iterator[BaseTunerLayer]:
    """All tuner layers, foreign ones too."""
    return (layer for layer in module.modules() if isinstance(layer, BaseTunerLayer))


@contextmanager
def without_adapters(pipe: Any) -> Iterator[None]:
    """The base as it is without adapters, whatever is active; parameters keep their flags."""
    layers = [layer for part in present(pipe) for layer in tuner_layers(component(pipe, part))]
    before = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True  # PEFT's `enable_adapters` would set requires_grad as well
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def nora_layers(module: nn.Module, adapter_name: str) -> dict[str, NoraLayer]:
    """The layers that hold an adapter, by canonical path."""
    return {
        canonical(path): layer
        for path, layer in module.named_modules()
        if isinstance(layer, NoraLayer) and adapter_name in layer.nora_delta
    }


def refuse_merged(pipe: Any) -> None:
    """Refuse to read base weights while an adapter is fused into them."""
    for name in present(pipe):
        if any(layer.merged for layer in tuner_layers(component(pipe, name))):
            raise UserError(f"an adapter is fused into the {name}: call unfuse_lora() first")


def refuse_offloaded(pipe: Any) -> None:
    """Refuse to read or write weights that are elsewhere until their layer is called."""
    for name in present(pipe):
        if any(parameter.is_meta for parameter in component(pipe, name).parameters()):
            raise UserError(
                f"the weights of the {name} are offloaded layer by layer: call pipe.remove_all_hooks() first, and "
                "enable_sequential_cpu_offload() again afterwards"
            )


def refuse_serving(pipe: Any) -> None:
    """Refuse to put adapters in or take them out while ``mixed_batch`` says which row has which."""
    if any(getattr(component(pipe, name), "serves_rows", False) for name in present(pipe)):
        raise UserError("the pipeline is serving a mixed batch: leave that context first")


def fingerprint(layer: nn.Module, path: str) -> float:
    """``u^T W v / sqrt(d_out d_in)`` with seeded normal ``u``, ``v``: nearly equal for fp16, bf16, fp32 copies.

    Of a layer whose weight was quantized since it is what was noted of the weight before, in ``true_fingerprint``.
    """
    if (noted := getattr(layer, "true_fingerprint", None)) is not None:
        return float(noted)
    weight: Tensor = layer.weight.detach().flatten(1).float()  # type: ignore[operator]
    # Drawn on the CPU, the same for all devices; the weight, gigabytes over a model, stays where it is.
    generator = torch.Generator().manual_seed(sum(canonical(path).encode()))
    u, v = (torch.randn(size, generator=generator).to(weight.device) for size in weight.shape)
    return float(u @ weight @ v) / weight.numel() ** 0.5


def same_weights(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> bool:
    """Whether the fingerprints ``theirs`` are ``ours`` of the same projections: ``||f - g|| <= 1e-2 ||g||``.

    Loose enough for fp16, bf16 and fp32 copies of one model; false where a number is not finite.
    """
    distance = math.dist([ours[key] for key in theirs], list(theirs.values()))
    return distance <= FINGERPRINT_TOLERANCE * math.hypot(*theirs.values())
