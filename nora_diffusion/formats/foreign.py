"""Files of other tools: recognized by their keys and explained.

A *module* of such a file is one projection: its factors by name (``lora_down``, ``hada_w1_a`` ...), shapes only until
they are asked for. Keys of LoRAs are brought to kohya's names: ``down``, ``up``, ``mid``, ``alpha``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import UserError
from ..io.tensor_file import TensorFile
from ..io.untrusted import clean, is_plain
from .adapter_info import AdapterInfo

Family = Literal["lora", "loha", "lokr", "embedding"]

FACTORS = {
    "lora_A.weight": "down", "lora_B.weight": "up", "lora_down.weight": "down", "lora_up.weight": "up",
    "lora.down.weight": "down", "lora.up.weight": "up", "lora_mid.weight": "mid", "alpha": "alpha",
    "dora_scale": "dora", "lora_magnitude_vector": "dora", "lora_magnitude_vector.weight": "dora",
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
}  # fmt: skip
RANKED = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""Factors whose first side is the rank."""
REFUSED = {
    "model.diffusion_model.": "a whole checkpoint, not an adapter",
    "oft_": "an OFT adapter", "boft_": "a BOFT adapter", ".diff": "a full-weight difference",
    "on_input": "an IA3 adapter", "ia3_": "an IA3 adapter",
    "first_stage_model.": "a VAE or whole checkpoint, not an adapter", "controlnet_": "a ControlNet, not an adapter",
    "image_proj": "an IP-Adapter", "conv_in.": "the weights of a whole model, not an adapter",
    "embeddings.": "the weights of a whole model, not an adapter",
}  # fmt: skip
PREFIXES = {
    "lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
    "lora_transformer_": "transformer", "unet.": "unet", "transformer.": "transformer",
    "text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2", "text_encoder_3.": "text_encoder_3",
    "base_model.model.": "",
}  # fmt: skip
FAMILY_NAMES = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "embedding": "textual inversion"}


@dataclass
class Module:
    """One projection of a foreign file: component (empty if the file does not say), its name there, keys by factor."""

    component: str
    name: str
    keys: dict[str, str]


def family_of(reader: TensorFile) -> Family:
    """What kind of file this is. Raises :class:`UserError` with a sentence for one that nothing here can load."""
    keys = list(reader.entries)
    for family, mark in (("lokr", "lokr_"), ("loha", "hada_"), ("lora", "lora")):
        if any(mark in key for key in keys):
            return family  # type: ignore[return-value]
    shapes = [len(entry.shape) for entry in reader.entries.values()]
    lone = len(keys) == 1 and "." not in keys[0]
    if keys and all(n in (1, 2) for n in shapes) and (lone or set(keys) <= {"clip_l", "clip_g", "emb_params"}):
        return "embedding"
    raise UserError(f"{reader.path} is {_what_it_is(keys)}: load_adapter does not know how to load it")


def _what_it_is(keys: list[str]) -> str:
    for mark, name in REFUSED.items():
        if any(mark in key for key in keys):
            return name
    return "no adapter of this toolkit, no LoRA, LoHa, LoKr or textual inversion" if keys else "empty"


def recognize(reader: TensorFile) -> AdapterInfo:
    """What a file without our metadata is, checked for whole pairs. Raises :class:`UserError` for what cannot load."""
    if "nora_pack" in reader.metadata:
        raise UserError(f"{reader.path} is a pack of many subjects: name one of them, {reader.path}#NAME")
    reader.require_floats()
    family = family_of(reader)
    metadata = {key: clean(value) for key, value in reader.metadata.items() if len(value) < 1000}
    info = AdapterInfo(components={}, path=str(reader.path))
    info.trigger = metadata.get("modelspec.trigger_phrase", "") or metadata.get("trigger", "")
    info.base = metadata.get("ss_sd_model_name", "") or metadata.get("base", "")
    if family == "embedding":
        info.kind, info.trigger = "textual inversion", info.trigger or token_of(reader)
        info.components = {"text_encoder": {"method": "textual_inversion", "r": _vectors(reader), "inner_r": 1}}
    else:
        modules = read_modules(reader)
        info.kind = f"{_tool(reader)} {_variant(reader, family, modules)}"
        for module in modules:
            entry = info.components.setdefault(module.component or "unet", {"method": family, "r": 1, "inner_r": 1})
            shapes = {factor: reader.entries[key].shape for factor, key in module.keys.items()}
            entry["r"] = max(entry["r"], rank_of(shapes) or 1)
    article = "an" if info.kind[0] in "aeiou" else "a"
    info.note = f"{article} {info.kind} file of another tool"
    return info


def _tool(reader: TensorFile) -> str:
    first = next(iter(reader.entries))
    if first.startswith("base_model.model."):
        return "PEFT"
    return "kohya" if first.startswith("lora_") else "diffusers"


def _variant(reader: TensorFile, family: Family, modules: list[Module]) -> str:
    names = {name for module in modules for name in module.keys}
    if family != "lora":
        return FAMILY_NAMES[family]
    if "dora" in names:
        return "DoRA"
    conv = any(reader.entries[m.keys["down"]].shape[2:] not in ((), (1, 1)) for m in modules)
    return "LoCon" if conv or "mid" in names else "LoRA"


def read_modules(reader: TensorFile) -> list[Module]:
    """The projections of a LoRA-like file. Raises :class:`UserError` for half a pair and for keys that fit none."""
    found: dict[str, Module] = {}
    for key in reader.entries:
        name, factor = _split(key)
        if factor is None:
            raise UserError(f"{reader.path}: the key {key} belongs to no kind of adapter that is known here")
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix is None:
            raise UserError(f"{reader.path}: {key} does not say which part of a pipeline it is for")
        module = found.setdefault(name, Module(PREFIXES[prefix], name.removeprefix(prefix), {}))
        module.keys[factor] = key
    for module in found.values():
        _check_whole(reader, module)
    return list(found.values())


def _split(key: str) -> tuple[str, str | None]:
    for suffix, factor in FACTORS.items():
        if key.endswith(f".{suffix}"):
            return key[: -len(suffix) - 1], factor
    return key, None


def _check_whole(reader: TensorFile, module: Module) -> None:
    names = set(module.keys)
    whole = {"down", "up"} <= names or {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= names
    sides = ("lokr_w1", "lokr_w2")
    whole = whole or all(side in names or {f"{side}_a", f"{side}_b"} <= names for side in sides)
    if not whole:
        raise UserError(f"{reader.path} holds only half of {module.name}: copy it again")
    shapes = {factor: reader.entries[key].shape for factor, key in module.keys.items()}
    if any(len(s) not in (2, 4) for f, s in shapes.items() if f not in ("alpha", "dora", "mid")):
        raise UserError(f"{reader.path}: a factor of {module.name} is no matrix")
    if "down" in shapes and "mid" not in shapes and shapes["down"][0] != shapes["up"][1]:
        ranks = f"{shapes['down'][0]} and {shapes['up'][1]}"
        raise UserError(f"{reader.path}: the two halves of {module.name} have different ranks, {ranks}")
    if "alpha" in shapes and reader.entries[module.keys["alpha"]].numel != 1:
        raise UserError(f"{reader.path}: alpha of {module.name} is no single number")


def rank_of(shapes: Mapping[str, Sequence[int]]) -> int | None:
    """The rank that a module's factors have by their shapes; None where both Kronecker factors are stored whole."""
    return next((shapes[factor][0] for factor in RANKED if factor in shapes), None)


def token_of(reader: TensorFile) -> str:
    """The token of a textual inversion: its key, or the file's name where the key says nothing."""
    keys = list(reader.entries)
    named = len(keys) == 1 and keys[0] != "emb_params" and is_plain(keys[0])
    return keys[0] if named else reader.path.stem


def _vectors(reader: TensorFile) -> int:
    shape = next(iter(reader.entries.values())).shape
    return shape[0] if len(shape) == 2 else 1
