"""The parts of a pipeline that adapters sit in, and the paths of their projections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn

from .adapters import AdapterConfig, NoraLayer
from .errors import UserError

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def denoiser_name(pipe: Any) -> str:
    """``"unet"`` or ``"transformer"``, whichever the pipeline has."""
    for name in ("unet", "transformer"):
        if getattr(pipe, name, None) is not None:
            return name
    raise UserError(f"{type(pipe).__name__} has neither a unet nor a transformer: adapters need one of them")


def component(pipe: Any, name: str) -> nn.Module:
    """One adaptable part of a pipeline. Raises :class:`UserError` that lists those there are."""
    module = getattr(pipe, name, None) if name in COMPONENTS else None
    if module is None:
        raise UserError(f"{name!r} is no part of {type(pipe).__name__}: choose among {', '.join(present(pipe))}")
    return module


def present(pipe: Any) -> list[str]:
    """Names of the adaptable parts that this pipeline has."""
    return [name for name in COMPONENTS if getattr(pipe, name, None) is not None]


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
    picked = {path: layer for path, layer in projections(module).items() if _matches(config, path)}
    if not picked:
        raise UserError(
            f"target_modules={config.target_modules!r} matches no projection of {type(module).__name__}: "
            "use the groups attn, ff, proj, conv or module names"
        )
    return picked


def _matches(config: AdapterConfig, path: str) -> bool:
    return bool(check_target_module_exists(config, path))


def tuner_layers(module: nn.Module) -> Iterator[BaseTunerLayer]:
    """All tuner layers, foreign ones too."""
    return (layer for layer in module.modules() if isinstance(layer, BaseTunerLayer))


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
        if any(layer.merged for layer in tuner_layers(getattr(pipe, name))):
            raise UserError(f"an adapter is fused into the {name}: call unfuse_lora() first")


def fingerprint(layer: nn.Module, path: str) -> float:
    """``u^T W v / sqrt(d_out d_in)`` with seeded normal ``u``, ``v``: nearly equal for fp16, bf16, fp32 copies."""
    weight: Tensor = layer.weight.detach().flatten(1).float().cpu()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(sum(canonical(path).encode()))
    u = torch.randn(weight.shape[0], generator=generator)
    v = torch.randn(weight.shape[1], generator=generator)
    return float(u @ weight @ v) / (weight.shape[0] * weight.shape[1]) ** 0.5
