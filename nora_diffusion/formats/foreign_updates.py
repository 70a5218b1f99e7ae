"""The updates in other tools' files: checked against the pipeline, and as dense matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast, get_type_hints

import torch
from torch import Tensor

from ..adapters.axes import fits
from ..adapters.patterns import check_patterns
from ..errors import UserError
from ..io.tensor_file import TensorFile, require_finite
from ..io.tensors import Tensors
from ..io.untrusted import conform, parse_json
from ..pipelines.components import Modules, projections
from .foreign import BLOCK, PEFT_CONFIG, PEFT_FILE, SIDES, Module, Rows, blocks_of, rank_of, read_modules
from .foreign_names import match_projections
from .keys import Projection

MAX_CONFIG = 2**20
MAX_SETTING = 2**20
"""Upper bound for ranks and alphas in another tool's config."""


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
        if (dense.shape[0], dense[0].numel()) != (weight.shape[0], weight[0].numel()):
            raise UserError(
                f"{reader.path} was made for another base: {module.name} is for a weight of shape "
                f"{tuple(dense.flatten(1).shape)}, this pipeline's is {tuple(weight.flatten(1).shape)}"
            )
        found[projection] = module, _shaped(factors, weight)
    return found


def _shaped(factors: Tensors, weight: Tensor) -> Tensors:
    """A LoRA's factors with as many dimensions as the weight: files may hold those of convolutions as matrices."""
    if "down" not in factors or "mid" in factors:
        return factors
    kernel = weight.shape[1:] if weight.dim() == 4 else (-1,)
    ones = (1, 1) if weight.dim() == 4 else ()
    down, up = factors["down"], factors["up"]
    return factors | {"down": down.reshape(down.shape[0], *kernel), "up": up.reshape(*up.shape[:2], *ones)}


def read_factors(reader: TensorFile, module: Module) -> Tensors:
    """Read a module's factors, DyLoRA's blocks put together. Raises :class:`UserError` for NaN and infinity."""
    found = {key: reader.raw(key) for key in module.keys.values()}
    require_finite(found, reader.path)
    tensors = {factor: computable(found[key].tensor()) for factor, key in module.keys.items()}
    factors = {factor: value for factor, value in tensors.items() if not BLOCK.fullmatch(factor)}
    for dimension, side in enumerate(SIDES):
        if blocks := blocks_of(tensors, side):
            factors[side] = torch.cat([blocks[number] for number in sorted(blocks)], dimension)
    return factors if module.rows is None else _rows_of(reader, module, module.rows, factors)


def computable(value: Tensor) -> Tensor:
    """A tensor in a dtype in which torch computes: fp16 has all values of 8-bit floats, fp32 those of alphas."""
    if not value.is_floating_point():
        return value.float()
    return value.half() if value.element_size() == 1 else value


def _rows_of(reader: TensorFile, module: Module, rows: Rows, factors: Tensors) -> Tensors:
    """The factors of some rows of ``dW = B A``: all of ``A``, and these rows of ``B``."""
    if not factors.keys() <= {"down", "up", "alpha"}:
        raise UserError(
            f"{reader.path}: {module.name} has its rows in another order, or several projections of this pipeline, and "
            "only a plain LoRA can be split: save it in diffusers' names with the tool that made it"
        )
    if len(factors["up"]) != rows.total:
        raise UserError(
            f"{reader.path} was made for another base: {module.name} has {len(factors['up'])} output rows, this "
            f"pipeline's projections have {rows.total}"
        )
    up = factors["up"][rows.start : rows.stop]
    return factors | {"up": up.roll(len(up) // 2, 0) if rows.swapped else up}


def dense_update(factors: Tensors) -> Tensor:
    """``dW`` without its scale, in fp64: ``B A`` (LoRA), ``(B1 A1) * (B2 A2)`` (LoHa), ``W1 kron W2`` (LoKr), or whole.

    Convolutions in Tucker form (with a core ``mid`` or ``t``) give ``[d_out, c, kh, kw]``.
    """
    f = {name: value.double() for name, value in factors.items()}
    try:
        if "diff" in f:
            return f["diff"]
        if "down" in f:
            if "mid" in f:
                return torch.einsum("or,rskl,sc->ockl", f["up"].flatten(1), f["mid"], f["down"].flatten(1))
            return f["up"].flatten(1) @ f["down"].flatten(1)
        if "hada_w1_a" in f:
            return _product(f, "hada_w1", "hada_t1") * _product(f, "hada_w2", "hada_t2")
        w1 = f["lokr_w1"] if "lokr_w1" in f else _product(f, "lokr_w1", "")
        w2 = f["lokr_w2"] if "lokr_w2" in f else _product(f, "lokr_w2", "lokr_t2")
        return torch.kron(w1 if w2.dim() == 2 else w1[:, :, None, None], w2.contiguous())
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in factors.items())
        raise UserError(f"its factors do not fit together ({shapes}): copy it again") from None


def _product(f: Tensors, name: str, core: str) -> Tensor:
    a, b = f[f"{name}_a"], f[f"{name}_b"]
    if core in f:
        return torch.einsum("ijkl,ip,jr->prkl", f[core], a, b)
    return a.flatten(1) @ b.flatten(1)


@dataclass
class LoraSettings:
    """The fields of a PEFT config that change an update, type-checked; of LoRA, LoHa and LoKr."""

    r: int | None = None
    lora_alpha: float | None = None
    alpha: float | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None
    decompose_factor: int | None = None

    @classmethod
    def read(cls, values: Any) -> LoraSettings:
        """Check untrusted values. Raises ``ValueError`` for the first invalid one."""
        if not isinstance(values, dict):
            raise ValueError("they are not a table")
        hints = get_type_hints(cls)
        settings = cls(**{k: conform(v, hints[k], k, MAX_SETTING) for k, v in values.items() if k in hints})
        ranks = [settings.r, *(settings.rank_pattern or {}).values()]
        if any(rank is not None and rank < 1 for rank in ranks):
            raise ValueError("a rank is below 1")
        for name in ("rank_pattern", "alpha_pattern"):
            check_patterns(name, getattr(settings, name))
        return settings


NO_SETTINGS = LoraSettings()


class Scales:
    """``alpha / r`` of a file's modules: from ``.alpha`` keys, the metadata or PEFT's config beside it, else 1."""

    def __init__(self, reader: TensorFile) -> None:
        self.path, self.settings = reader.path, lora_settings(reader)

    def of(self, module: Module, factors: Mapping[str, Tensor]) -> float:
        """The scale of one module."""
        rank = rank_of({factor: value.shape for factor, value in factors.items()})
        if "alpha" in factors:
            # LyCORIS ignores alpha if both Kronecker factors are stored whole.
            return float(factors["alpha"]) / rank if rank else 1.0
        own = self.settings.get(module.component) or self.settings.get("") or NO_SETTINGS
        alpha = _by_pattern(own.alpha_pattern, module.name, own.alpha if own.lora_alpha is None else own.lora_alpha)
        r = _by_pattern(own.rank_pattern, module.name, own.r or rank)
        if r is not None and rank is not None and r != rank:
            raise UserError(
                f"{self.path}: its LoRA settings are for rank {r}, but the factors of {module.name} have rank {rank}: "
                "copy both again"
            )
        if alpha is None or r is None:
            if self.path.name == PEFT_FILE or own is not NO_SETTINGS:
                raise UserError(
                    f"{self.path}: its scale is unknown, since {PEFT_CONFIG} is missing or has no alpha and rank: copy "
                    "it again, into the folder of the file"
                )
            return 1.0
        return alpha / r ** (0.5 if own.use_rslora else 1.0)


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Look up PEFT's patterns, which match the end of a path."""
    return next((value for pattern, value in (patterns or {}).items() if fits(pattern, name)), default)


def lora_settings(reader: TensorFile) -> dict[str, LoraSettings]:
    """PEFT's configs by component, from diffusers' metadata; under ``""`` the ``adapter_config.json`` beside the file.

    Raises :class:`UserError` for damaged values and for patterns that could take long to match.
    """
    try:
        found: dict[str, dict[str, Any]] = {}
        for key, value in dict(parse_json(reader.metadata.get("lora_adapter_metadata", "{}"))).items():
            component, _, name = key.partition(".")
            found.setdefault(component, {})[name] = value
        config = reader.path.parent / PEFT_CONFIG
        if reader.path.name == PEFT_FILE and config.is_file():
            if config.stat().st_size > MAX_CONFIG:
                raise ValueError(f"{PEFT_CONFIG} is larger than {MAX_CONFIG >> 20} MiB")
            found[""] = dict(parse_json(config.read_bytes()))
        return {component: LoraSettings.read(values) for component, values in found.items()}
    except (ValueError, AttributeError, TypeError, OSError) as error:
        raise UserError(f"{reader.path}: its LoRA settings are damaged ({error}): copy it again") from error
