"""Adapter files of other tools: recognized by their keys, and read module by module.

A *module* of such a file holds the factors of one projection. The factors of a LoRA are called as in kohya's files:
``down``, ``up``, ``mid``, ``alpha``; those of LoHa and LoKr as in LyCORIS (``hada_w1_a``, ``lokr_w1`` ...). ``diff`` is
a whole update. All names that tools give to factors and components stand in :data:`RENAMED`, :data:`FACTORS` and
:data:`PREFIXES`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

from ..errors import UserError
from ..io.tensor_file import FLOATS, FLOATS_8, TensorFile
from ..io.untrusted import clean
from ..pipelines.names import COMPONENTS
from .adapter_info import AdapterInfo
from .foreign_tags import prompts_of

T = TypeVar("T")
Family = Literal["lora", "loha", "lokr", "embedding"]

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_FILE, EMBEDDING_FILE = "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"
"""File names that PEFT gives to adapters and configs, diffusers to LoRAs and to textual inversions."""
PEFT_PREFIX = "base_model.model."
EMBEDDING_KEY = "emb_params"
EMBEDDING_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""The key of a textual inversion in A1111's files, and those for two text encoders (SDXL)."""

RENAMED = {
    # PEFT's wrapper, also below the name of a component, and its slot for the adapter's name
    r"(^|\.)base_model\.model\.": r"\1",
    r"\.lora_([AB])\.[\w-]+\.weight$": r".lora_\1.weight",
    r"\.lora_([AB])$": r".lora_\1.weight",
    r"\.lora_magnitude_vector(\.[\w-]+)*$": ".dora_scale_peft",
    # diffusers' earlier names: attention processors, and the layers of text encoders
    r"\.processor\.": ".",
    r"\.(qkv|proj)_lora([12])\.(?=(down|up)\.weight$)": r".\1\2.lora.",  # XLabs' Flux
    r"\.self_attn\.to_out(_lora\.|\.dora_scale)": r".self_attn.out_proj\1",
    r"\.self_attn\.to_([qkv])(_lora\.|\.dora_scale)": r".self_attn.\1_proj\2",
    r"\.to_out(_lora\.|\.dora_scale)": r".to_out.0\1",
    r"_lora\.(?=(down|up)\.weight$)": ".lora.",
    r"\.lora_linear_layer\.": ".lora.",
}
"""Other spellings of keys, as regular expressions, and what they are read as; applied in this order."""
FACTORS = {
    "lora_A.weight": "down", "lora_B.weight": "up", "lora_down.weight": "down", "lora_up.weight": "up",
    "lora.down.weight": "down", "lora.up.weight": "up", "lora_mid.weight": "mid", "alpha": "alpha",
    "dora_scale": "dora", "dora_scale_peft": "dora", "diff": "diff",
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
}  # fmt: skip
RANKED = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""Factors whose first dimension is the rank."""
SIDES = ("down", "up")
BLOCK = re.compile(r"(down|up)_list\.(\d{1,4})")
"""Factors of LyCORIS' DyLoRA, the rank in numbered blocks: ``down_list.<n> [b, d_in]``, ``up_list.<n> [d_out, b]``."""
BUNDLED = re.compile(r"bundle_emb\.(.+)\.(\w+)")
"""OneTrainer's embeddings inside a LoRA file: ``bundle_emb.<token>.<encoder>``."""
OTHER_METHODS = {
    "boft_": "a BOFT adapter", "oft_": "an OFT adapter", "on_input": "an IA3 adapter", "ia3_": "an IA3 adapter",
}  # fmt: skip
REFUSED = {
    "model.diffusion_model.": "a whole checkpoint, not an adapter", **OTHER_METHODS,
    "first_stage_model.": "a VAE or whole checkpoint, not an adapter", "controlnet_": "a ControlNet, not an adapter",
    "image_proj": "an IP-Adapter", "conv_in.": "the weights of a whole model, not an adapter",
    "embeddings.": "the weights of a whole model, not an adapter",
}  # fmt: skip
REFUSED_FACTORS = {
    **OTHER_METHODS,
    "a1": "a GLoRA adapter", "a2": "a GLoRA adapter", "b1": "a GLoRA adapter", "b2": "a GLoRA adapter",
    "w_norm": "the trained weights of a normalization", "b_norm": "the trained weights of a normalization",
    "diff_b": "the difference of a bias", "set_weight": "a whole weight", "bias": "a trained bias",
    "lora_embedding_": "a LoRA of an embedding", "modules_to_save": "the weights of a whole layer",
}  # fmt: skip
"""What keys of no adapter that is read are, by the beginning of their last parts."""
DENOISER = "denoiser"
"""Stands for the UNet or the transformer, if a file's names are the same for both."""
T5 = "t5"
"""Stands for the T5, which is SD3's third, Flux's second and PixArt's only text encoder."""
T5_PREFIX = "text_encoders.t5xxl.transformer."
"""ComfyUI's name of the T5."""
PREFIXES = {
    "lora_unet_": DENOISER, "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
    "lora_te3_": T5, "lora_transformer_": "transformer", "lycoris_": DENOISER,
    "model.diffusion_model.": DENOISER, "diffusion_model.": DENOISER,
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_h.transformer.": "text_encoder", "text_encoders.clip_g.transformer.": "text_encoder_2",
    T5_PREFIX: T5, **{f"{name}.": name for name in COMPONENTS},
}  # fmt: skip
"""The component that a module's name begins with, in files of kohya, OneTrainer, SimpleTuner, ComfyUI and diffusers."""
BARE = {
    r"(down_blocks|mid_block|up_blocks)\.": "unet",
    r"(transformer_blocks|single_transformer_blocks|joint_blocks|double_blocks|single_blocks)\.": DENOISER,
    r"text_model\.": "text_encoder",
}
"""Modules that name no component, as in the first files of diffusers and the first Flux LoRAs, and what they are of."""
WHOLE = ".diff"
"""The end of the key of a whole update, as LyCORIS' "full" and ComfyUI's extractions have."""
INTEGERS = ("I32", "I64")
"""What a file may hold for alpha, beside floats: some tools save it so."""
FAMILY_NAMES = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "embedding": "textual inversion"}


class Rows(NamedTuple):
    """The output rows ``[start, stop)`` of a module with ``total`` rows; ``swapped``: their second half comes first."""

    start: int
    stop: int
    total: int
    swapped: bool = False


@dataclass
class Module:
    """One projection in the file: component (empty if the file does not state it), name, and the key of each factor.

    ``rows``: the rows of the projection, if the module is several projections in one.
    """

    component: str
    name: str
    keys: dict[str, str]
    rows: Rows | None = None

    def shapes(self, reader: TensorFile) -> dict[str, tuple[int, ...]]:
        """The shape of each factor."""
        shapes = {factor: reader.entries[key].shape for factor, key in self.keys.items()}
        joined = {factor: shape for factor, shape in shapes.items() if not BLOCK.fullmatch(factor)}
        for dimension, side in enumerate(SIDES):
            if not (blocks := blocks_of(shapes, side)):
                continue
            sizes = [shape[dimension] for shape in blocks.values() if len(shape) > dimension]
            (before, after), *others = {(shape[:dimension], shape[dimension + 1 :]) for shape in blocks.values()}
            if others or len(sizes) < len(blocks) or sorted(blocks) != list(range(len(blocks))):
                problem = f"its blocks {side}_list are incomplete or of different shapes: copy it again"
                raise UserError(f"{reader.path}: {self.name}: {problem}")
            joined[side] = (*before, sum(sizes), *after)
        return joined


def blocks_of(factors: Mapping[str, T], side: str) -> dict[int, T]:
    """DyLoRA's blocks of a side by their numbers."""
    return {
        int(match[2]): v for factor, v in factors.items() if (match := BLOCK.fullmatch(factor)) and match[1] == side
    }


def family_of(reader: TensorFile) -> Family:
    """The kind of adapter in a file. Raises :class:`UserError` for files that ``load_adapter`` cannot load."""
    keys = list(reader.entries)
    families: dict[Family, str] = {"lokr": "lokr_", "loha": "hada_", "lora": "lora"}
    for family, marker in families.items():
        if any(marker in key for key in keys):
            return family
    if any(key.endswith(WHOLE) for key in keys):
        return "lora"
    dimensions = [len(entry.shape) for entry in reader.entries.values()]
    single = len(keys) == 1 and "." not in keys[0]
    if (
        keys
        and all(n in (1, 2) for n in dimensions)
        and (single or set(keys) <= {EMBEDDING_KEY, *EMBEDDING_KEYS.values()})
    ):
        return "embedding"
    raise UserError(f"{reader.path} is {_describe(keys)}: load_adapter cannot load it")


def _describe(keys: list[str]) -> str:
    """What a file of no known family is."""
    for marker, name in REFUSED.items():
        if any(marker in key for key in keys):
            return name
    return "not an adapter of this toolkit, a LoRA, LoHa, LoKr or textual inversion" if keys else "empty"


def recognize(reader: TensorFile) -> AdapterInfo:
    """Metadata of a file without ours, derived from its keys.

    Raises :class:`UserError` for incomplete modules and for files that ``load_adapter`` cannot load.
    """
    if "nora_pack" in reader.metadata:
        raise UserError(f"{reader.path} is a pack of many subjects: choose one of them with {reader.path}#NAME")
    family = family_of(reader)
    floats = FLOATS if family == "embedding" else (*FLOATS, *FLOATS_8)
    reader.require_floats(floats, {".alpha": INTEGERS})
    metadata = {key: clean(value) for key, value in reader.metadata.items() if len(value) < 1000}
    info = AdapterInfo(components={}, path=str(reader.path))
    info.trigger = metadata.get("modelspec.trigger_phrase", "") or metadata.get("trigger", "")
    info.prompts = prompts_of(reader.metadata)
    info.base = metadata.get("ss_sd_model_name", "") or metadata.get("base", "")
    if family == "embedding":
        info.kind, info.trigger = "textual inversion", info.trigger or token_of(reader)
        info.components = {"text_encoder": {"method": "textual_inversion", "r": _num_vectors(reader), "inner_r": 1}}
    else:
        modules = read_modules(reader)
        info.kind = f"{_tool(reader)} {_variant(reader, family, modules)}"
        for module in modules:
            component = {"": "unet", DENOISER: "unet", T5: "text_encoder_3"}.get(module.component, module.component)
            entry = info.components.setdefault(component, {"method": family, "r": 1, "inner_r": 1})
            entry["r"] = max(entry["r"], rank_of(module.shapes(reader)) or 1)
        info.trigger = info.trigger or ", ".join(bundled_tokens(reader))
    article = "an" if info.kind[0] in "aeiou" else "a"
    info.note = f"{article} {info.kind} file of another tool"
    if bundled := bundled_tokens(reader):
        info.note += f" with the embeddings of {', '.join(bundled)}"
    return info


def _tool(reader: TensorFile) -> str:
    first = next(key for key in reader.entries if not BUNDLED.fullmatch(key))
    tools = {
        PEFT_PREFIX: "PEFT", "lora_": "kohya", "lycoris_": "LyCORIS", "diffusion_model.": "ComfyUI",
        "model.diffusion_model.": "ComfyUI", "text_encoders.": "ComfyUI",
    }  # fmt: skip
    return next((tool for prefix, tool in tools.items() if first.startswith(prefix)), "diffusers")


def _variant(reader: TensorFile, family: Family, modules: list[Module]) -> str:
    if family != "lora":
        return FAMILY_NAMES[family]
    factors = {factor for module in modules for factor in module.keys}
    if factors <= {"diff", "alpha"}:
        return "full update"
    if "dora" in factors:
        return "DoRA"
    if any(BLOCK.fullmatch(factor) for factor in factors):
        return "DyLoRA"
    conv = any(reader.entries[m.keys["down"]].shape[2:] not in ((), (1, 1)) for m in modules if "down" in m.keys)
    return "LoCon" if conv or "mid" in factors else "LoRA"


def read_modules(reader: TensorFile) -> list[Module]:
    """The modules of a LoRA, LoHa or LoKr. Raises :class:`UserError` for unknown keys and incomplete modules."""
    found: dict[str, Module] = {}
    for key in reader.entries:
        if BUNDLED.fullmatch(key):
            continue
        name, factor = _split(key)
        if factor is None:
            raise UserError(f"{reader.path}: the key {key} {_kind_of(key)}: load the file with the tool that made it")
        component, path = _component(reader, key, name)
        module = found.setdefault(f"{component}.{path}", Module(component, path, {}))
        if factor in module.keys:
            raise UserError(f"{reader.path} holds one factor twice, as {module.keys[factor]} and {key}")
        module.keys[factor] = key
    for module in found.values():
        _check_complete(reader, module)
    return list(found.values())


def _split(key: str) -> tuple[str, str | None]:
    """The module's name and the factor in a key."""
    for pattern, replacement in RENAMED.items():
        key = re.sub(pattern, replacement, key)
    if match := re.fullmatch(rf"(.+)\.({BLOCK.pattern})(\.weight)?", key):
        return match[1], match[2]
    for suffix, factor in FACTORS.items():
        if key.endswith(f".{suffix}"):
            return key[: -len(suffix) - 1], factor
    return key, None


def _component(reader: TensorFile, key: str, name: str) -> tuple[str, str]:
    """The component that a module's name begins with, and the rest of the name."""
    prefix = next((p for p in PREFIXES if name.startswith(p)), None)
    if prefix is not None:
        return PREFIXES[prefix], name.removeprefix(prefix)
    if key.startswith(PEFT_PREFIX):
        return "", name
    component = next((component for pattern, component in BARE.items() if re.match(pattern, name)), None)
    if component is None:
        raise UserError(f"{reader.path}: {key} does not state which component of a pipeline it is for")
    return component, name


def _kind_of(key: str) -> str:
    """What a key that is not read is, as the predicate of a sentence."""
    kinds = (text for part in key.split(".")[-3:] for start, text in REFUSED_FACTORS.items() if part.startswith(start))
    kind = next(kinds, None)
    return f"belongs to {kind}, which cannot be read" if kind else "belongs to no known kind of adapter"


def _check_complete(reader: TensorFile, module: Module) -> None:
    shapes = module.shapes(reader)
    factors = set(shapes)
    complete = {"down", "up"} <= factors or {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= factors
    sides = ("lokr_w1", "lokr_w2")
    complete = (
        complete or "diff" in factors or all(side in factors or {f"{side}_a", f"{side}_b"} <= factors for side in sides)
    )
    if not complete:
        raise UserError(f"{reader.path}: factors of {module.name} are missing: copy it again")
    if any(0 in shape for shape in shapes.values()):
        raise UserError(f"{reader.path}: a factor of {module.name} is empty: copy it again")
    if any(len(s) not in (2, 4) for f, s in shapes.items() if f not in ("alpha", "dora", "mid")):
        raise UserError(f"{reader.path}: a factor of {module.name} is not a matrix or a convolution kernel")
    if "down" in shapes and "mid" not in shapes and shapes["down"][0] != shapes["up"][1]:
        ranks = f"{shapes['down'][0]} and {shapes['up'][1]}"
        raise UserError(f"{reader.path}: the factors of {module.name} have different ranks, {ranks}")
    if "alpha" in shapes and reader.entries[module.keys["alpha"]].numel != 1:
        raise UserError(f"{reader.path}: alpha of {module.name} is not a single number")


def rank_of(shapes: Mapping[str, Sequence[int]]) -> int | None:
    """A module's rank by the shapes of its factors; ``None`` if both Kronecker factors of a LoKr are stored whole."""
    return next((shapes[factor][0] for factor in RANKED if factor in shapes), None)


def bundled_tokens(reader: TensorFile) -> dict[str, dict[str, str]]:
    """The embeddings inside a LoRA file: the key of each encoder's vectors (``clip_l`` ...), by token."""
    found: dict[str, dict[str, str]] = {}
    for key in reader.entries:
        if match := BUNDLED.fullmatch(key):
            found.setdefault(clean(match[1]), {})[match[2]] = key
    return found


def token_of(reader: TensorFile) -> str:
    """The token of a textual inversion: its key, or the file's name if the key is a generic one."""
    keys = list(reader.entries)
    is_generic = len(keys) != 1 or keys[0] in (EMBEDDING_KEY, *EMBEDDING_KEYS.values())
    return reader.path.stem if is_generic else keys[0]


def _num_vectors(reader: TensorFile) -> int:
    shape = next(iter(reader.entries.values())).shape
    return shape[0] if len(shape) == 2 else 1
