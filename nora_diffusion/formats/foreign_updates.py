"""The updates in other tools' files: checked against the pipeline, and as dense matrices."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import UserError, first_line
from ..io.tensor_file import TensorFile, Tensors, require_finite
from ..io.untrusted import parse_json
from ..pipelines.components import Modules, projections
from .foreign import PEFT_CONFIG, PEFT_FILE, Module, rank_of, read_modules
from .foreign_names import match_projections
from .keys import Projection

MAX_CONFIG = 2**20


def dense_updates(components: Modules, reader: TensorFile) -> Iterator[tuple[str, str, Tensor]]:
    """Yield ``(component, path, dW)`` of every projection: fp64, ``[d_out, d_in]``, with the scale.

    Raises :class:`UserError` for a file that does not fit the pipeline (before the first) and for a DoRA.
    """
    scales = Scales(reader)
    for (component, path), (module, factors) in fitted_modules(components, reader).items():
        if "dora" in factors:
            raise UserError(
                f"{reader.path} is a DoRA: its magnitudes are not a low-rank update and cannot be projected"
            )
        yield component, path, scales.of(module, factors) * dense_update(factors).flatten(1)


def fitted_modules(components: Modules, reader: TensorFile) -> dict[Projection, tuple[Module, Tensors]]:
    """The modules of a file and their factors, by the projection that they adapt.

    Raises :class:`UserError` if the pipeline has no such projection, for a different shape and for NaN.
    """
    layers = {component: projections(model) for component, model in components.items()}
    found = {}
    for projection, module in match_projections(components, str(reader.path), read_modules(reader)).items():
        factors = read_factors(reader, module)
        weight = cast(Tensor, layers[projection[0]][projection[1]].weight)
        try:
            dense = dense_update({factor: value.to("meta") for factor, value in factors.items()})
        except UserError as error:
            raise UserError(f"{reader.path}: {module.name}: {error}") from error
        if dense.shape[0] != weight.shape[0] or dense.numel() != weight.numel():
            raise UserError(
                f"{reader.path} was made for another base: {module.name} is for a weight of shape "
                f"{tuple(dense.flatten(1).shape)}, this pipeline's is {tuple(weight.flatten(1).shape)}"
            )
        found[projection] = module, factors
    return found


def read_factors(reader: TensorFile, module: Module) -> Tensors:
    """Read a module's factors. Raises :class:`UserError` for NaN and infinity."""
    tensors = {key: reader.tensor(key) for key in module.keys.values()}
    require_finite(tensors, reader.path)
    return {factor: tensors[key] for factor, key in module.keys.items()}


def dense_update(factors: Tensors) -> Tensor:
    """``dW`` without its scale, in fp64: ``B A`` (LoRA), ``(B1 A1) * (B2 A2)`` (LoHa), ``W1 kron W2`` (LoKr).

    Convolutions in Tucker form (with a core ``mid`` or ``t``) give ``[d_out, c, kh, kw]``.
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
        raise UserError(f"its factors do not fit together ({first_line(error)})") from None


def _product(f: Tensors, name: str, core: str) -> Tensor:
    a, b = f[f"{name}_a"], f[f"{name}_b"]
    if core in f:
        return torch.einsum("ijkl,ip,jr->prkl", f[core], a, b)
    return a.flatten(1) @ b.flatten(1)


class Scales:
    """``alpha / r`` of a file's modules: from ``.alpha`` keys, the metadata or PEFT's config beside it, else 1."""

    def __init__(self, reader: TensorFile) -> None:
        self.config = peft_config(reader)

    def of(self, module: Module, factors: Mapping[str, Tensor]) -> float:
        """The scale of one module."""
        rank = rank_of({factor: value.shape for factor, value in factors.items()})
        if "alpha" in factors:
            # LyCORIS ignores alpha if both Kronecker factors are stored whole.
            return float(factors["alpha"]) / rank if rank else 1.0
        config = self.config.get(module.component) or self.config.get("") or {}
        alpha = _by_pattern(config.get("alpha_pattern"), module.name, config.get("lora_alpha", config.get("alpha")))
        r = _by_pattern(config.get("rank_pattern"), module.name, config.get("r", rank))
        if not alpha or not r:
            return 1.0
        return float(alpha) / float(r) ** (0.5 if config.get("use_rslora") else 1.0)


def _by_pattern(patterns: Any, name: str, default: Any) -> Any:
    """Look up PEFT's patterns as plain suffixes: an untrusted regular expression is never executed."""
    table = patterns if isinstance(patterns, dict) else {}
    plain = {re.sub(r"[\^$\\]", "", key): value for key, value in table.items()}
    return next((v for key, v in plain.items() if f".{name}".endswith(f".{key}")), default)


def peft_config(reader: TensorFile) -> dict[str, dict[str, Any]]:
    """PEFT's configs by component, from diffusers' metadata; under ``""`` the ``adapter_config.json`` beside the file.

    Raises :class:`UserError` if they cannot be parsed.
    """
    try:
        values = parse_json(reader.metadata.get("lora_adapter_metadata", "{}"))
        found: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            component, _, name = key.partition(".")
            found.setdefault(component, {})[name] = value
        config = reader.path.parent / PEFT_CONFIG
        if reader.path.name == PEFT_FILE and config.is_file() and config.stat().st_size < MAX_CONFIG:
            found[""] = dict(parse_json(config.read_bytes()))
    except (ValueError, AttributeError, TypeError, OSError) as error:
        raise UserError(f"{reader.path}: its LoRA settings are damaged ({error}): copy it again") from error
    return found
