"""Load files of other tools through their libraries: LoRAs and embeddings by diffusers, LoHa and LoKr by PEFT."""

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
from .tokens import pieces_of

Fitting = dict[Projection, tuple[Module, Tensors]]


def load_foreign(pipe: Any, modules: Modules, info: AdapterInfo, name: str, activate: bool, weight: float) -> int:
    """Load a file of another tool as the adapter ``name``, all or nothing; returns the number of tensors in it.

    Raises :class:`UserError` for another base, a wrong shape, NaN, and a file that the other library refuses.
    """
    with TensorFile(Path(info.path)) as reader:
        family = family_of(reader)
        if family == "embedding":
            _load_embedding(pipe, modules, reader)
        else:
            _load_layers(pipe, modules, reader, family, info, name, activate, weight)
        return len(reader.entries)


def _load_layers(
    pipe: Any, modules: Modules, reader: TensorFile, family: str, info: AdapterInfo, name: str, activate: bool,
    weight: float,
) -> None:  # fmt: skip
    found = fitted_modules(modules, reader)
    check_new_name(pipe, modules, name, dict.fromkeys(component for component, _ in found))
    refuse_merged(modules)
    if any("mid" in own for _, own in found.values()):
        raise UserError(
            f"{info.path} is {info.note} in Tucker form (lora_mid), which diffusers does not load: convert it with "
            "`nora-diffusion import`"
        )
    before = {component: active_adapters(module) for component, module in modules.items()}
    # diffusers drops kohya's dora_scale, and alphas and ranks that differ within a file.
    renamed = family == "lora" and not _describes_itself(reader, info)
    with ExitStack() as stack:
        stack.enter_context(_restored_on_error(modules, info.path, before))
        stack.enter_context(all_or_nothing(pipe, modules, name))
        for module in modules.values():
            stack.enter_context(keeping_trained(module))
        if family != "lora":
            _inject(modules, reader, family, name, found)
        elif renamed:
            pipe.load_lora_weights(_renamed(reader, found), adapter_name=name)
        else:  # as folder and name: older diffusers accept a file's path only with access to the hub
            file = Path(info.path)
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
        _check_applied(modules, info.path, name, len(found))
        for component, module in modules.items():
            layers = [layer for layer in tuner_layers(module) if name in held(layer)]
            set_active(module, [*before[component], name] if activate and layers else before[component])
            for layer in layers:
                if renamed:  # older diffusers set the alpha of all modules to the rank of one
                    layer.lora_alpha[name] = layer.r[name]
                layer.set_scale(name, weight)


@contextmanager
def _restored_on_error(modules: Modules, path: str, before: dict[str, list[str]]) -> Iterator[None]:
    """On an error of another library, remove the empty wrappers that it left, and raise a :class:`UserError`."""
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
    """Remove tuner layers without adapters, except those in ``known`` (by id)."""
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
            f"{path} was made for another base: only {len(layers)} of its {wanted} projections could be applied"
        )


def _describes_itself(reader: TensorFile, info: AdapterInfo) -> bool:
    """Whether a LoRA has PEFT's configs in its metadata, where diffusers reads them."""
    return info.kind.startswith("diffusers") and "lora_adapter_metadata" in reader.metadata


def _renamed(reader: TensorFile, found: Fitting) -> Tensors:
    """A LoRA's tensors under diffusers' keys, which have no scale: it is multiplied into ``B``."""
    scales, renamed = Scales(reader), {}
    for (component, path), (module, factors) in found.items():
        scale, up = scales.of(module, factors), factors["up"]
        renamed[f"{component}.{path}.lora_A.weight"] = factors["down"]
        # In fp32, so that the only rounding is the cast to the model's dtype.
        renamed[f"{component}.{path}.lora_B.weight"] = up if scale == 1 else up.float() * scale
        if "dora" in factors:
            renamed[f"{component}.{path}.lora_magnitude_vector.weight"] = _magnitude(reader, module, factors)
    return renamed


def _magnitude(reader: TensorFile, module: Module, factors: Tensors) -> Tensor:
    """DoRA's magnitude in diffusers' shape: ``[d_out]``, or ``[1, d_out, 1, 1]`` for a convolution."""
    m, up = factors["dora"], factors["up"]
    by_row = m.numel() == up.shape[0] and ("lora_magnitude" in module.keys["dora"] or m.shape[0] == up.shape[0])
    if not by_row:
        raise UserError(
            f"{reader.path} is a DoRA that diffusers and PEFT do not support: {module.name} has one magnitude per "
            "input channel; load it with the tool that made it"
        )
    return m.flatten() if up.ndim == 2 else m.reshape(1, -1, 1, 1)


def _inject(modules: Modules, reader: TensorFile, family: str, name: str, found: Fitting) -> None:
    """Load LoHa and LoKr by PEFT's tuners: build a config from the factors' shapes, inject, copy the values."""
    from peft import inject_adapter_in_model

    for component in dict.fromkeys(component for component, _ in found):
        entries = {path: entry for (c, path), entry in found.items() if c == component}
        module = modules[component]
        inject_adapter_in_model(_config(reader, family, entries), module, name)
        module._hf_peft_config_loaded = True  # type: ignore[assignment]  # diffusers' flag
        layers = {
            path.replace(".base_layer", ""): layer for path, layer in module.named_modules() if _holds(layer, name)
        }
        for path, (source, factors) in entries.items():
            _fill(reader, layers[path], name, source, factors)


def _holds(layer: nn.Module, name: str) -> bool:
    return isinstance(layer, BaseTunerLayer) and name in held(layer)


def _config(reader: TensorFile, family: str, entries: dict[str, tuple[Module, Tensors]]) -> Any:
    from peft import LoHaConfig, LoKrConfig

    scales = Scales(reader)
    ranks = {path: _peft_rank(factors) for path, (_, factors) in entries.items()}
    r = max(ranks.values())
    alphas = {path: scales.of(module, factors) * ranks[path] for path, (module, factors) in entries.items()}
    names = {factor for _, factors in entries.values() for factor in factors}
    shared = {
        "r": r,
        "alpha": r,
        "target_modules": "|".join(re.escape(path) for path in entries),
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
    """The rank at which PEFT creates factors of these shapes; it creates an undecomposed ``w2`` at a large rank."""
    shapes = {factor: value.shape for factor, value in factors.items()}
    return rank_of(shapes) or max(shapes["lokr_w2"][:2])


def _fill(reader: TensorFile, layer: Any, name: str, source: Module, factors: Tensors) -> None:
    own = {table: getattr(layer, table)[name] for table in layer.adapter_layer_names if name in getattr(layer, table)}
    shapes = {factor: tuple(value.shape) for factor, value in factors.items() if factor != "alpha"}
    if shapes != {factor: tuple(value.shape) for factor, value in own.items()}:
        raise UserError(f"{reader.path}: PEFT decomposes {source.name} into other factors than this file does")
    for factor, parameter in own.items():
        parameter.data.copy_(factors[factor])


def _load_embedding(pipe: Any, modules: Modules, reader: TensorFile) -> None:
    """Load a textual inversion under its own token. Raises :class:`UserError` if it does not fit the text encoders."""
    if not hasattr(pipe, "load_textual_inversion"):
        raise UserError(f"{reader.path} is a textual inversion, which {type(pipe).__name__} does not support")
    token = token_of(reader)
    first = next((key for key in reader.entries if key != "clip_g"), None)
    keys = {"": first} if first else {}
    keys |= {"_2": "clip_g"} if "clip_g" in reader.entries else {}
    embeddings = []
    for suffix, key in keys.items():
        encoder: Any = modules.get(f"text_encoder{suffix}")
        tokenizer: Any = getattr(pipe, f"tokenizer{suffix}", None)
        vectors = reader.tensor(key)
        if encoder is None:
            raise UserError(f"{reader.path} was made for another base: this pipeline has no text_encoder{suffix}")
        weight = encoder.get_input_embeddings().weight
        if vectors.shape[-1] != weight.shape[1]:
            raise UserError(
                f"{reader.path} was made for another base: its embeddings have {vectors.shape[-1]} dimensions, "
                f"those of this pipeline's text encoder {weight.shape[1]}"
            )
        if not all_finite(vectors):
            raise UserError(f"{reader.path} holds NaN or infinity: the embedding is broken")
        if token in tokenizer.get_vocab():
            raise UserError(
                f"the pipeline already has the token {token!r}: call unload_textual_inversion({token!r}) first"
            )
        embeddings.append((vectors.to(weight.dtype), {"tokenizer": tokenizer, "text_encoder": encoder}))
    loaded: list[dict[str, Any]] = []
    try:
        for vectors, side in embeddings:
            pipe.load_textual_inversion({token: vectors}, token=token, **side)
            loaded.append(side)
    except Exception as error:
        count = max(len(vectors) if vectors.ndim == 2 else 1 for vectors, _ in embeddings)
        for side in loaded:
            pipe.unload_textual_inversion(pieces_of(token, count), **side)
        raise UserError(f"{reader.path} is refused by diffusers, which loads such files: {error}") from error
