"""Writers of plain LoRA files in the formats of diffusers, kohya and PEFT."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ..adapters.patterns import pattern_of
from ..errors import UserError
from ..formats.adapter_info import AdapterInfo
from ..formats.foreign import PEFT_CONFIG, PEFT_FILE, PEFT_PREFIX, T5_PREFIX
from ..formats.foreign_names import original_name
from ..io.files import write_atomic
from ..io.tensor_file import TensorFile, header_bytes
from ..io.tensors import Tensors, file_bytes
from ..pipelines.components import canonical
from .lora_metadata import Architecture, hashes, kohya_metadata, modelspec
from .plain_pair import OPEN_CLIP, PlainPair, with_whole_attention

Format = Literal["diffusers", "kohya", "peft"]
MAKER = "nora_diffusion"
SMALLEST_WIDTH = 320
"""Channels of the narrowest layers of SDXL's UNet."""


def _long_path(pair: PlainPair) -> str:
    """The path in diffusers' and kohya's files: always with ``text_model.`` for CLIP text encoders, not for T5."""
    path = canonical(pair.path)
    return f"text_model.{path}" if _is_clip(pair) else path


def _is_clip(pair: PlainPair) -> bool:
    return pair.component.startswith("text_encoder") and canonical(pair.path).startswith("encoder.layers.")


def _peft_path(pair: PlainPair) -> str:
    """The path in PEFT's files: the model's own, which for CLIP depends on the version of transformers."""
    return _clip_prefix(pair.component) + canonical(pair.path) if _is_clip(pair) else canonical(pair.path)


@functools.cache
def _clip_prefix(component: str) -> str:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        model = CLIPTextModelWithProjection if component == "text_encoder_2" else CLIPTextModel
        layers = [name for name, _ in model(CLIPTextConfig(num_hidden_layers=1)).named_parameters()]
    return "text_model." if any(name.startswith("text_model.encoder.") for name in layers) else ""


OTHER_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".gguf", ".onnx")


def export_file(dst: Path) -> Path:
    """The file for a destination: ``dst`` itself, or ``lora.safetensors`` in a folder.

    Raises :class:`UserError` for a file name of another format.
    """
    if dst.suffix in OTHER_SUFFIXES and not dst.is_dir():
        raise UserError(f"{dst} is not a safetensors file name: only safetensors is written, end it in .safetensors")
    return dst if dst.suffix == ".safetensors" else dst / "lora.safetensors"


def export_files(format: Format, dst: Path, info: AdapterInfo) -> list[Path]:
    """The files that an export writes, without those of new tokens."""
    if format == "peft":
        if dst.suffix == ".safetensors":
            raise UserError(f"PEFT's format is a folder with files of fixed names: give a folder instead of {dst}")
        return [dst / component / name for component in info.components for name in (PEFT_FILE, PEFT_CONFIG)]
    return [export_file(dst)]


def require_replaceable(files: Iterable[Path]) -> None:
    """Raise :class:`UserError` if a file exists that is not an older export of this toolkit."""
    for file in files:
        if file.exists() and not _is_export(file.with_name(PEFT_FILE) if file.name == PEFT_CONFIG else file):
            raise UserError(f"{file} exists and is not an export of {MAKER}: choose another name")


def _is_export(file: Path) -> bool:
    try:
        with TensorFile(file) as reader:
            return reader.metadata.get("made_by") == MAKER
    except UserError:
        return False


def _write_diffusers(dst: Path, info: AdapterInfo, pairs: list[PlainPair], dtype: torch.dtype) -> tuple[Path, int, int]:
    tensors: Tensors = {}
    magnitudes = {pair.component for pair in pairs if pair.magnitude is not None}
    for pair in pairs:
        if pair.component == "unet" and "unet" not in magnitudes:
            tensors |= pair.comfy_tensors(dtype)
        else:
            # Of the programs that read this format, diffusers ignores a T5 under any name.
            prefix = T5_PREFIX if pair.is_t5 else f"{pair.component}."
            tensors |= pair.peft_tensors(prefix + _long_path(pair), dtype)
    settings = {name: _lora_settings([p for p in pairs if p.component == name]) for name in info.components}
    metadata = {}
    if any(own["rank_pattern"] for own in settings.values()):  # else diffusers 0.38 takes the first rank for all alphas
        flat = {f"{component}.{name}": value for component, own in settings.items() for name, value in own.items()}
        metadata["lora_adapter_metadata"] = json.dumps(flat)
    file = export_file(dst)
    if any(pair.component == "unet" for pair in pairs):
        metadata |= modelspec(info, file.stem, architecture(info, pairs))
    return write_tensors(file, tensors, info, metadata)


def _lora_settings(pairs: Sequence[PlainPair]) -> dict[str, Any]:
    """Fields of PEFT's ``LoraConfig`` for a component's pairs. Each alpha equals the rank.

    PEFT matches the ends of paths, so CLIP's paths match without their prefix, which depends on transformers' version.
    """
    ranks = {pattern_of(canonical(pair.path)): pair.rank for pair in pairs}
    r = max(ranks.values())
    other_ranks = {pattern: rank for pattern, rank in ranks.items() if rank != r}
    return {
        "r": r, "lora_alpha": r, "rank_pattern": other_ranks, "alpha_pattern": other_ranks,
        "target_modules": sorted(canonical(pair.path) for pair in pairs),
        "use_dora": any(pair.magnitude is not None for pair in pairs),
    }  # fmt: skip


def architecture(info: AdapterInfo, pairs: Sequence[PlainPair]) -> Architecture:
    """Which Stable Diffusion an adapter is for, by what it adapts.

    Only SDXL has a second text encoder, a UNet with a text input wider than one text encoder, several transformer
    layers in one block, or an ``add_embedding``. Stable Diffusion 2 reads text of width 1,024, version 1 of 768.
    """
    reads_text = ("attn2.to_k", "attn2.to_v", "q_proj", "k_proj", "v_proj", "out_proj", "fc1")
    widths = {pair.component: pair.down.shape[1] for pair in pairs if pair.path.endswith(reads_text)}
    unet = [pair.path for pair in pairs if pair.component == "unet"]
    deep = any("transformer_blocks.1." in path or path.startswith("add_embedding.") for path in unet)
    text = widths.get("unet", 0)
    wide = text >= 2048 or text > widths.get("text_encoder", math.inf)
    named = re.search(r"sdxl|stable-diffusion-xl", info.base, re.IGNORECASE)
    if "text_encoder_2" in info.components or deep or wide or named:
        return "sdxl"
    return "sd2" if 1024 in (text, widths.get("text_encoder")) else "sd1"


def _layers_per_block(pairs: Sequence[PlainPair]) -> int:
    """``layers_per_block`` of an SDXL UNet. It is 2; only a small UNet, for tests, may have as many as are adapted."""
    unet = [pair for pair in pairs if pair.component == "unet"]
    if any(max(pair.down.shape[1], pair.up.shape[0]) >= SMALLEST_WIDTH for pair in unet):
        return 2
    found = [re.match(r"(down|up)_blocks\.\d+\.(?:resnets|attentions)\.(\d+)\.", pair.path) for pair in unet]
    return max([1, *(int(match[2]) + (match[1] == "down") for match in found if match)])


def _kohya_path(pair: PlainPair, layers: int | None, paths: Sequence[str]) -> str:
    """The path in kohya's files: of SDXL's UNet under Stability AI's names, which sd-scripts trains."""
    path = _long_path(pair)
    if pair.component == "unet" and layers is not None:
        path = original_name(path, layers, paths) or path
    return path.replace(".", "_")


def _write_kohya(dst: Path, info: AdapterInfo, pairs: list[PlainPair], dtype: torch.dtype) -> tuple[Path, int, int]:
    prefixes = {"unet": "lora_unet", "text_encoder_2": "lora_te2"}
    kind, paths = architecture(info, pairs), [pair.path for pair in pairs if pair.component == "unet"]
    prefixes["text_encoder"] = "lora_te1" if kind == "sdxl" else "lora_te"
    layers = _layers_per_block(pairs) if kind == "sdxl" else None
    tensors: Tensors = {}
    for pair in with_whole_attention(pairs, OPEN_CLIP.get(kind)):
        if pair.component not in prefixes:
            raise UserError(f"kohya's format has no name for {pair.component}: export to diffusers instead")
        tensors |= pair.kohya_tensors(f"{prefixes[pair.component]}_{_kohya_path(pair, layers, paths)}", dtype)
    file, rank = export_file(dst), max(pair.rank for pair in pairs)
    metadata = kohya_metadata(info, file.stem, kind, rank, max(pair.alpha or pair.rank for pair in pairs))
    return write_tensors(file, tensors, info, metadata | modelspec(info, file.stem, kind))


def _write_peft(dst: Path, info: AdapterInfo, pairs: list[PlainPair], dtype: torch.dtype) -> tuple[Path, int, int]:
    from peft import LoraConfig

    size = keys = 0
    for component in info.components:
        own = [pair for pair in pairs if pair.component == component]
        tensors: Tensors = {}
        for pair in own:
            tensors |= pair.peft_tensors(f"{PEFT_PREFIX}{_peft_path(pair)}", dtype)
        settings = _lora_settings(own)
        values = LoraConfig(**settings).to_dict() | {
            "target_modules": settings["target_modules"], "inference_mode": True,
        }  # fmt: skip
        _, written, count = write_tensors(dst / component / PEFT_FILE, tensors, info)
        write_atomic(dst / component / PEFT_CONFIG, json.dumps(values, indent=2, default=str))
        size, keys = size + written, keys + count
    return dst, size, keys


def write_tensors(
    path: Path, tensors: Tensors, info: AdapterInfo, more: Mapping[str, str] | None = None
) -> tuple[Path, int, int]:
    """Write a file with the adapter's origin (and ``more``) as metadata; return its path, bytes, number of tensors."""
    origin = {"trigger": info.trigger, "base": info.base, "source_sha256": info.sha256, "made_by": MAKER}
    metadata = {"format": "pt", **{k: v for k, v in origin.items() if v}, **(more or {})}
    if info.trigger:
        metadata["modelspec.trigger_phrase"] = info.trigger
    # Serialized once: the metadata, which holds the hash of the tensors, stands before them.
    content = file_bytes(path, tensors, {})
    start = 8 + int.from_bytes(content[:8], "little")
    entries, data = json.loads(content[8:start]), memoryview(content)[start:]
    entries.pop("__metadata__", None)
    write_atomic(path, (header_bytes({"__metadata__": metadata | hashes(data), **entries}), data))
    return path, path.stat().st_size, len(tensors)


WRITERS: dict[str, Callable[[Path, AdapterInfo, list[PlainPair], torch.dtype], tuple[Path, int, int]]] = {
    "diffusers": _write_diffusers,
    "kohya": _write_kohya,
    "peft": _write_peft,
}
"""Functions ``(destination, info, pairs, dtype) -> (path, bytes, number of tensors)``."""
