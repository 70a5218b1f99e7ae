"""Handing files of other tools to what can load them: LoRAs and embeddings to diffusers, LoHa and LoKr to PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..errors import UserError, first_line
from ..formats.adapter_info import AdapterInfo
from ..formats.foreign import Module, family_of, rank_of, token_of
from ..formats.foreign_updates import Scales, fitted_modules, peft_config
from ..formats.keys import Projection
from ..io.tensor_file import TensorFile, Tensors, all_finite
from ..pipelines.components import Modules, refuse_merged, tuner_layers
from .active import active_adapters, held, keeping_trained, set_active
from .inject import all_or_nothing, check_new_name

Fitting = dict[Projection, tuple[Module, Tensors]]


def load_foreign(pipe: Any, modules: Modules, info: AdapterInfo, name: str, activate: bool, weight: float) -> int:
    """Put a foreign file into the pipeline under ``name``, all or nothing; returns how many tensors it held.

    Raises :class:`UserError` for another base, a wrong shape, NaN and what the other library refuses.
    """
    with TensorFile(Path(info.path)) as reader:
        family = family_of(reader)
        if family == "embedding":
            _load_embedding(pipe, reader)
        else:
            _load_layers(pipe, modules, reader, family, info, name, activate, weight)
        return len(reader.entries)


def _load_layers(
    pipe: Any, modules: Modules, reader: TensorFile, family: str, info: AdapterInfo, name: str, activate: bool,
    weight: float,
) -> None:  # fmt: skip
    found = fitted_modules(modules, reader)
    check_new_name(pipe, modules, name, list(dict.fromkeys(component for component, _ in found)))
    refuse_merged(modules)
    if any("mid" in own for _, own in found.values()):
        raise UserError(
            f"{info.path} is {info.note} in Tucker form (lora_mid), which diffusers does not load: make an adapter "
            "of it with `nora-diffusion import`"
        )
    before = {component: active_adapters(module) for component, module in modules.items()}
    # diffusers leaves out kohya's dora_scale, and loses alphas and ranks that differ within a file.
    renamed = family == "lora" and not _describes_itself(reader, info)
    with ExitStack() as stack:
        stack.enter_context(_as_before(modules, info.path, before))
        stack.enter_context(all_or_nothing(pipe, modules, name))
        for module in modules.values():
            stack.enter_context(keeping_trained(module))
        if family != "lora":
            _inject(modules, reader, family, name, found)
        elif renamed:
            pipe.load_lora_weights(_renamed(reader, found), adapter_name=name)
        else:  # by folder and name: older diffusers know a file by its path only when they may ask the hub
            file = Path(info.path)
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
        _check_applied(modules, info.path, name, len(found))
        for component, module in modules.items():
            mine = [layer for layer in tuner_layers(module) if name in held(layer)]
            set_active(module, [*before[component], name] if activate and mine else before[component])
            for layer in mine:
                if renamed:  # older diffusers take the alpha of all modules from the rank of one
                    layer.lora_alpha[name] = layer.r[name]
                layer.set_scale(name, weight)


@contextmanager
def _as_before(modules: Modules, path: str, before: dict[str, list[str]]) -> Iterator[None]:
    """Takes out the empty wrappers that another library leaves, and says what went wrong, when that fails."""
    wrapped = {component: {id(layer) for layer in tuner_layers(module)} for component, module in modules.items()}
    try:
        yield
    except BaseException as error:
        for component, module in modules.items():
            _unwrap(module, wrapped[component])
            set_active(module, before[component])
        if isinstance(error, UserError) or not isinstance(error, Exception):
            raise
        raise UserError(f"{path} is refused by the library that loads such files: {first_line(error)}") from error


def _unwrap(module: nn.Module, known: set[int]) -> None:
    """Take out empty wrappers that were not there before."""
    for parent in list(module.modules()):
        for child_name, child in list(parent.named_children()):
            while isinstance(child, BaseTunerLayer) and id(child) not in known and not held(child):
                child = child.base_layer
                setattr(parent, child_name, child)
    if not any(True for _ in tuner_layers(module)):
        module._hf_peft_config_loaded = False  # type: ignore[assignment]


def _check_applied(modules: Modules, path: str, name: str, wanted: int) -> None:
    layers = [layer for module in modules.values() for layer in tuner_layers(module) if name in held(layer)]
    if len(layers) != wanted:
        raise UserError(
            f"{path} was made for another base: {len(layers)} of its {wanted} projections found their place"
        )


def _describes_itself(reader: TensorFile, info: AdapterInfo) -> bool:
    """Whether a LoRA brings PEFT's configs in the metadata that diffusers reads."""
    return info.kind.startswith("diffusers") and "lora_adapter_metadata" in reader.metadata


def _renamed(reader: TensorFile, found: Fitting) -> Tensors:
    """A LoRA with diffusers' keys; its scale, which these have no place for, goes into ``B``."""
    scales, renamed = Scales(reader), {}
    for (part, path), (module, own) in found.items():
        scale, up = scales.of(module, own), own["up"]
        renamed[f"{part}.{path}.lora_A.weight"] = own["down"]
        # In fp32, so that the one rounding is that to the model's type.
        renamed[f"{part}.{path}.lora_B.weight"] = up if scale == 1 else up.float() * scale
        if "dora" in own:
            renamed[f"{part}.{path}.lora_magnitude_vector.weight"] = _magnitude(reader, module, own)
    return renamed


def _magnitude(reader: TensorFile, module: Module, own: Tensors) -> Tensor:
    """DoRA's magnitude as diffusers lays it out: ``[d_out]``, or ``[1, d_out, 1, 1]`` for a convolution."""
    m, up = own["dora"], own["up"]
    by_row = m.numel() == up.shape[0] and ("lora_magnitude" in module.keys["dora"] or m.shape[0] == up.shape[0])
    if not by_row:
        raise UserError(
            f"{reader.path} is a DoRA that diffusers and PEFT do not compute: {module.name} has its magnitude by input "
            "channel; load it with the tool that made it"
        )
    return m.flatten() if up.ndim == 2 else m.reshape(1, -1, 1, 1)


def _inject(modules: Modules, reader: TensorFile, family: str, name: str, found: Fitting) -> None:
    """LoHa and LoKr through PEFT's own tuners: a config made from the factors' shapes, then the numbers."""
    from peft import inject_adapter_in_model

    for component in dict.fromkeys(component for component, _ in found):
        mine = {path: value for (c, path), value in found.items() if c == component}
        module = modules[component]
        inject_adapter_in_model(_config(reader, family, mine), module, name)
        module._hf_peft_config_loaded = True  # type: ignore[assignment]
        layers = {
            path.replace(".base_layer", ""): layer for path, layer in module.named_modules() if _holds(layer, name)
        }
        for path, (source, factors) in mine.items():
            _fill(reader, layers[path], name, source, factors)


def _holds(layer: nn.Module, name: str) -> bool:
    return isinstance(layer, BaseTunerLayer) and name in held(layer)


def _config(reader: TensorFile, family: str, mine: dict[str, tuple[Module, Tensors]]) -> Any:
    from peft import LoHaConfig, LoKrConfig

    scales = Scales(reader)
    ranks = {path: _peft_rank(factors) for path, (_, factors) in mine.items()}
    r = max(ranks.values())
    alphas = {path: scales.of(module, factors) * ranks[path] for path, (module, factors) in mine.items()}
    names = {factor for _, factors in mine.values() for factor in factors}
    shared = {
        "r": r,
        "alpha": r,
        "target_modules": "|".join(re.escape(path) for path in mine),
        "rank_pattern": {f"^{re.escape(path)}": rank for path, rank in ranks.items()},
        "alpha_pattern": {f"^{re.escape(path)}": alpha for path, alpha in alphas.items()},
        "use_effective_conv2d": bool(names & {"hada_t1", "lokr_t2"}),
        "inference_mode": True,
    }
    if family == "loha":
        return LoHaConfig(**shared)
    config = peft_config(reader).get("", {})
    factor = config.get("decompose_factor", -1)
    return LoKrConfig(
        **shared, decompose_both="lokr_w1_a" in names, decompose_factor=factor if type(factor) is int else -1
    )


def _peft_rank(factors: Tensors) -> int:
    """The rank for which PEFT makes factors of these shapes; a whole ``w2`` is what it makes for a large one."""
    shapes = {factor: value.shape for factor, value in factors.items()}
    return rank_of(shapes) or max(shapes["lokr_w2"][:2])


def _fill(reader: TensorFile, layer: Any, name: str, source: Module, factors: Tensors) -> None:
    own = {table: getattr(layer, table)[name] for table in layer.adapter_layer_names if name in getattr(layer, table)}
    shapes = {factor: tuple(value.shape) for factor, value in factors.items() if factor != "alpha"}
    if shapes != {factor: tuple(value.shape) for factor, value in own.items()}:
        raise UserError(f"{reader.path}: PEFT splits {source.name} into other factors than this file has")
    for factor, parameter in own.items():
        parameter.data.copy_(factors[factor])


def _load_embedding(pipe: Any, reader: TensorFile) -> None:
    """A textual inversion, under its own token; the vectors must fit the text encoders."""
    if not hasattr(pipe, "load_textual_inversion"):
        raise UserError(f"{reader.path} is a textual inversion, and a {type(pipe).__name__} takes none")
    token = token_of(reader)
    sides = [("clip_g", "_2")] if "clip_g" in reader.entries else []
    first = next((key for key in reader.entries if key != "clip_g"), None)
    sides = [(first, ""), *sides] if first else sides
    jobs = []
    for key, suffix in sides:
        encoder: Any = getattr(pipe, f"text_encoder{suffix}", None)
        tokenizer: Any = getattr(pipe, f"tokenizer{suffix}", None)
        vectors = reader.tensor(key)
        size = encoder.get_input_embeddings().weight.shape[1] if encoder is not None else "no such encoder"
        if vectors.shape[-1] != size:
            raise UserError(
                f"{reader.path} was made for another base: its vectors have {vectors.shape[-1]} numbers, "
                f"this pipeline's text encoder has {size}"
            )
        if not all_finite(vectors):
            raise UserError(f"{reader.path} holds NaN or infinity: the embedding is broken")
        if token in tokenizer.get_vocab():
            raise UserError(f"the word {token!r} is in the pipeline already: unload_textual_inversion({token!r}) first")
        jobs.append((vectors, tokenizer, encoder))
    done: list[dict[str, Any]] = []
    try:
        for vectors, tokenizer, encoder in jobs:
            kind, side = encoder.get_input_embeddings().weight.dtype, {"tokenizer": tokenizer, "text_encoder": encoder}
            pipe.load_textual_inversion({token: vectors.to(kind)}, token=token, **side)
            done.append(side)
    except Exception as error:
        words = [token, *(f"{token}_{i}" for i in range(1, _most_vectors(jobs)))]
        for side in done:
            pipe.unload_textual_inversion(words, **side)
        raise UserError(f"{reader.path} is refused by diffusers, which loads such files: {error}") from error


def _most_vectors(jobs: list[tuple[Tensor, Any, Any]]) -> int:
    return max(len(vectors) if vectors.ndim == 2 else 1 for vectors, _, _ in jobs)
