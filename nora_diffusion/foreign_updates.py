"""The updates that files of other tools describe, as dense matrices, and the projections they are for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .components import canonical, component, denoiser_name, present, projections
from .errors import UserError
from .foreign import Module, read_modules
from .tensor_file import TensorFile, Tensors, all_finite
from .untrusted import parse_json

MAX_CONFIG = 2**20
RANKED = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""Factors whose first side is the rank."""


def places(pipe: Any, path: str, modules: list[Module]) -> dict[tuple[str, str], Module]:
    """The projection of the pipeline that each module is for, ``(component, path)``. Raises :class:`UserError`."""
    found = {}
    for module in modules:
        parts = [module.component] if module.component else _likely(pipe, module)
        where = next((place for part in parts if (place := _place(pipe, part, module.name))), None)
        if where is None:
            raise UserError(f"{path} was made for another base: this pipeline has no {module.name}")
        found[where] = module
    return found


def _likely(pipe: Any, module: Module) -> list[str]:
    """PEFT's own files do not say which component they are for; the names of the projections tell."""
    return [denoiser_name(pipe), *(part for part in present(pipe) if part.startswith("text_encoder"))]


def _place(pipe: Any, part: str, name: str) -> tuple[str, str] | None:
    if part not in present(pipe):
        return None
    for path in projections(component(pipe, part)):
        short = canonical(path)
        if name in (path, short, f"text_model.{short}") or name in (
            p.replace(".", "_") for p in (path, f"text_model.{short}")
        ):
            return part, path
    return None


def updates(pipe: Any, reader: TensorFile) -> Iterator[tuple[str, str, Tensor]]:
    """``(component, path, dW)`` of every projection, fp64, ``[d_out, d_in]``, scale included."""
    scales = Scales(reader)
    for (part, path), module in places(pipe, str(reader.path), read_modules(reader)).items():
        factors = factors_of(reader, module)
        if "dora" in factors:
            raise UserError(f"{reader.path} is a DoRA: its magnitudes are no low-rank update and cannot be projected")
        base = projections(component(pipe, part))[path]
        weight: Tensor = base.weight  # type: ignore[assignment]
        dense = scales.of(module, factors) * dense_update(factors)
        if dense.numel() != weight.numel() or dense.shape[0] != weight.shape[0]:
            raise wrong_shape(reader.path, module, dense, base)
        yield part, path, dense.flatten(1)


def wrong_shape(path: Path, module: Module, dense: Tensor, base: nn.Module) -> UserError:
    """The refusal of a module that fits its projection's name but not its size."""
    weight: Tensor = base.weight  # type: ignore[assignment]
    return UserError(
        f"{path} was made for another base: {module.name} is for a weight of {tuple(dense.flatten(1).shape)}, "
        f"this pipeline's is {tuple(weight.flatten(1).shape)}"
    )


def factors_of(reader: TensorFile, module: Module) -> Tensors:
    """A module's factors, read. Refuses NaN and infinity."""
    factors = {factor: reader.tensor(key) for factor, key in module.keys.items()}
    for factor, value in factors.items():
        if not all_finite(value):
            raise UserError(f"{reader.path}: {module.keys[factor]} holds NaN or infinity: the adapter is broken")
    return factors


def dense_update(factors: Tensors) -> Tensor:
    """``dW`` without scale: ``B A`` (LoRA), ``(B1 A1) * (B2 A2)`` (LoHa), ``W1 kron W2`` (LoKr); fp64.

    Convolutions of rank ``r`` with a core ``mid`` or ``t`` (Tucker form) give ``[d_out, c, kh, kw]``.
    """
    f = {name: value.double() for name, value in factors.items()}
    try:
        if "down" in f:
            if "mid" in f:
                return torch.einsum("or,rskl,sc->ockl", f["up"].flatten(1), f["mid"], f["down"].flatten(1))
            return f["up"].flatten(1) @ f["down"].flatten(1)
        if "hada_w1_a" in f:
            return _product(f, "hada_w1", "hada_t1") * _product(f, "hada_w2", "hada_t2")
        w1 = f["lokr_w1"] if "lokr_w1" in f else _product(f, "lokr_w1", "")
        w2 = f["lokr_w2"] if "lokr_w2" in f else _product(f, "lokr_w2", "lokr_t2")
        return torch.kron(w1 if w2.dim() == 2 else w1[:, :, None, None], w2)
    except RuntimeError as error:
        raise UserError(f"its factors do not fit together ({str(error).splitlines()[0]})") from None


def _product(f: Tensors, name: str, core: str) -> Tensor:
    a, b = f[f"{name}_a"], f[f"{name}_b"]
    if core in f:
        return torch.einsum("ijkl,ip,jr->prkl", f[core], a, b)
    return a.flatten(1) @ b.flatten(1)


class Scales:
    """``alpha / r`` of a file's modules: from its ``.alpha`` keys, its metadata or PEFT's config beside it, else 1."""

    def __init__(self, reader: TensorFile) -> None:
        self.config = peft_config(reader)

    def of(self, module: Module, factors: Mapping[str, Tensor]) -> float:
        """The scale of one module."""
        rank = next((factors[f].shape[0] for f in RANKED if f in factors), None)
        if "alpha" in factors:
            # LyCORIS ignores alpha where both Kronecker factors are stored whole.
            return float(factors["alpha"]) / rank if rank else 1.0
        config = self.config.get(module.component) or self.config.get("") or {}
        alpha = _by_pattern(config.get("alpha_pattern"), module.name, config.get("lora_alpha", config.get("alpha")))
        r = _by_pattern(config.get("rank_pattern"), module.name, config.get("r", rank))
        if not alpha or not r:
            return 1.0
        return float(alpha) / float(r) ** (0.5 if config.get("use_rslora") else 1.0)


def _by_pattern(patterns: Any, name: str, default: Any) -> Any:
    """PEFT's patterns as plain suffixes; nothing from a file is run as a regular expression."""
    table = patterns if isinstance(patterns, dict) else {}
    plain = {re.sub(r"[\^$\\]", "", key): value for key, value in table.items()}
    return next((v for key, v in plain.items() if f".{name}".endswith(f".{key}")), default)


def peft_config(reader: TensorFile) -> dict[str, dict[str, Any]]:
    """PEFT's configs by component: diffusers' metadata, or ``adapter_config.json`` beside the file (under ``""``)."""
    try:
        values = parse_json(reader.metadata.get("lora_adapter_metadata", "{}"))
        found: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            part, _, name = key.partition(".")
            found.setdefault(part, {})[name] = value
        beside = reader.path.parent / "adapter_config.json"
        if reader.path.name == "adapter_model.safetensors" and beside.is_file() and beside.stat().st_size < MAX_CONFIG:
            found[""] = dict(parse_json(beside.read_bytes()))
    except (ValueError, AttributeError, TypeError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"{reader.path}: the description of its scales is damaged ({error}): copy it again") from error
    return found
