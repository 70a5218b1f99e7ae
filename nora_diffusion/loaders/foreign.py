"""Load files of other tools through their libraries: LoRAs and embeddings by diffusers, LoHa and LoKr by PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..adapters.tuner.guards import guard
from ..errors import UserError, first_line
from ..formats.adapter_info import AdapterInfo
from ..formats.foreign import Module, bundled_tokens, family_of, rank_of, token_of
from ..formats.foreign_updates import LoraSettings, Scales, fitted_modules, lora_settings
from ..formats.keys import Projection
from ..io.tensor_file import TensorFile, Tensors, all_finite, require_finite
from ..pipelines.components import Modules, refuse_merged, tuner_layers
from .active import active_adapters, delete_adapter, held, keeping_trained, set_active, unwrap_empty
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
            _load_embeddings(pipe, _own_embedding(pipe, modules, reader))
        else:
            embeddings = _bundled_embeddings(pipe, modules, reader)
            _load_layers(pipe, modules, reader, family, info, name, activate, weight)
            try:
                _load_embeddings(pipe, embeddings)
            except BaseException:
                delete_adapter(pipe, name)
                raise
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
    if family != "lora" and any("dora" in own for _, own in found.values()):
        raise UserError(
            f"{info.path} is {info.note} with magnitudes (dora_scale), which neither PEFT nor `nora-diffusion import` "
            "reads: load it with the tool that made it"
        )
    before = {component: active_adapters(module) for component, module in modules.items()}
    with ExitStack() as stack:
        stack.enter_context(_restored_on_error(modules, info.path, before))
        stack.enter_context(all_or_nothing(pipe, modules, name))
        for module in modules.values():
            stack.enter_context(keeping_trained(module))
        if family != "lora":
            _inject(modules, reader, family, name, found)
        else:  # not the file itself: diffusers drops dora_scale, and alphas and ranks that differ within a file
            pipe.load_lora_weights(_renamed(reader, found), adapter_name=name)
        _check_applied(modules, info.path, name, len(found))
        for component, module in modules.items():
            layers = [layer for layer in tuner_layers(module) if name in held(layer)]
            if layers:
                guard(module)
            set_active(module, [*before[component], name] if activate and layers else before[component])
            for layer in layers:
                if family == "lora":  # older diffusers set the alpha of all modules to the rank of one
                    layer.lora_alpha[name] = layer.r[name]
                layer.set_scale(name, weight)


@contextmanager
def _restored_on_error(modules: Modules, path: str, before: dict[str, list[str]]) -> Iterator[None]:
    """On an error of another library, remove the empty wrappers that it left, and raise a :class:`UserError`."""
    try:
        yield
    except BaseException as error:
        for component, module in modules.items():
            unwrap_empty(module)
            set_active(module, before[component])
        if isinstance(error, UserError) or not isinstance(error, Exception):
            raise
        raise UserError(
            f"diffusers or PEFT cannot load {path} ({first_line(error)[:200]}): convert it with `nora-diffusion import`"
        ) from error


def _check_applied(modules: Modules, path: str, name: str, wanted: int) -> None:
    layers = [layer for module in modules.values() for layer in tuner_layers(module) if name in held(layer)]
    if len(layers) != wanted:
        raise UserError(
            f"{path} was made for another base: only {len(layers)} of its {wanted} projections could be applied"
        )


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
    require_finite(renamed, reader.path)
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
    factor = lora_settings(reader).get("", LoraSettings()).decompose_factor
    return LoKrConfig(**shared, decompose_both="lokr_w1_a" in names, decompose_factor=-1 if factor is None else factor)


def _peft_rank(factors: Tensors) -> int:
    """The rank at which PEFT creates factors of these shapes; it creates an undecomposed ``w2`` at a large rank."""
    shapes = {factor: value.shape for factor, value in factors.items()}
    return rank_of(shapes) or max(shapes["lokr_w2"][:2])


def _fill(reader: TensorFile, layer: Any, name: str, source: Module, factors: Tensors) -> None:
    own = {table: getattr(layer, table)[name] for table in layer.adapter_layer_names if name in getattr(layer, table)}
    shapes = {factor: tuple(value.shape) for factor, value in factors.items() if factor != "alpha"}
    if shapes != {factor: tuple(value.shape) for factor, value in own.items()}:
        raise UserError(
            f"{reader.path}: PEFT has no layer for the factors of {source.name}: convert it with "
            "`nora-diffusion import`"
        )
    for factor, parameter in own.items():
        parameter.data.copy_(factors[factor])


@dataclass
class Embedding:
    """The vectors of a token for one text encoder."""

    token: str
    vectors: Tensor
    side: dict[str, Any]
    path: str


ENCODERS = {"clip_l": "", "clip_g": "_2", "clip_h": ""}
"""The ending of a pipeline's attributes (``text_encoder_2``) by other tools' names of text encoders."""


def _own_embedding(pipe: Any, modules: Modules, reader: TensorFile) -> list[Embedding]:
    """The vectors in a textual inversion file, checked."""
    token = token_of(reader)
    first = next((key for key in reader.entries if key != "clip_g"), None)
    keys = ({"": first} if first else {}) | ({"_2": "clip_g"} if "clip_g" in reader.entries else {})
    return [_embedding(pipe, modules, reader, token, key, suffix) for suffix, key in keys.items()]


def _bundled_embeddings(pipe: Any, modules: Modules, reader: TensorFile) -> list[Embedding]:
    """The vectors that OneTrainer writes into a LoRA file, checked."""
    found = []
    for token, keys in bundled_tokens(reader).items():
        for encoder, key in keys.items():
            if encoder not in ENCODERS:
                raise UserError(
                    f"{reader.path} holds the embedding {key}, which diffusers cannot load: train it without output "
                    "embeddings, or take the key out"
                )
            found.append(_embedding(pipe, modules, reader, token, key, ENCODERS[encoder]))
    return found


def _embedding(pipe: Any, modules: Modules, reader: TensorFile, token: str, key: str, suffix: str) -> Embedding:
    """One embedding. Raises :class:`UserError` if it does not fit the text encoder."""
    if not hasattr(pipe, "load_textual_inversion"):
        raise UserError(f"{reader.path} holds a textual inversion, which {type(pipe).__name__} does not support")
    encoder: Any = modules.get(f"text_encoder{suffix}")
    tokenizer: Any = getattr(pipe, f"tokenizer{suffix}", None)
    vectors = reader.tensor(key)
    if encoder is None:
        raise UserError(f"{reader.path} was made for another base: this pipeline has no text_encoder{suffix}")
    weight = encoder.get_input_embeddings().weight
    if vectors.dim() not in (1, 2) or vectors.shape[-1] != weight.shape[1]:
        raise UserError(
            f"{reader.path} was made for another base: its embeddings have {vectors.shape[-1]} dimensions, "
            f"those of this pipeline's text encoder {weight.shape[1]}"
        )
    if not all_finite(vectors):
        raise UserError(f"{reader.path} holds NaN or infinity: the embedding is broken")
    if token in tokenizer.get_vocab():
        raise UserError(f"the pipeline already has the token {token!r}: call unload_textual_inversion({token!r}) first")
    side = {"tokenizer": tokenizer, "text_encoder": encoder}
    return Embedding(token, vectors.to(weight.dtype), side, str(reader.path))


def _load_embeddings(pipe: Any, embeddings: list[Embedding]) -> None:
    """Load checked embeddings under their own tokens, all or nothing."""
    loaded: list[Embedding] = []
    try:
        for one in embeddings:
            pipe.load_textual_inversion({one.token: one.vectors}, token=one.token, **one.side)
            loaded.append(one)
    except Exception as error:
        for one in loaded:
            count = len(one.vectors) if one.vectors.ndim == 2 else 1
            pipe.unload_textual_inversion(pieces_of(one.token, count), **one.side)
        raise UserError(
            f"diffusers cannot load the embedding {embeddings[len(loaded)].token!r} of {embeddings[0].path} "
            f"({first_line(error)[:200]}): use another one"
        ) from error
