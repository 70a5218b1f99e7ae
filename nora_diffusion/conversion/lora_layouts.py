"""Plain LoRAs as other tools lay them out: the tensors' names, the paths in them, the files."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from ..adapters.patterns import pattern_of
from ..errors import UserError
from ..formats.adapter_file import AdapterInfo, Tensors
from ..io.files import write_atomic
from ..io.tensor_file import TensorFile
from ..pipelines.components import canonical

Format = Literal["diffusers", "kohya", "peft"]
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAKER = "nora_diffusion"


@dataclass
class PlainPair:
    """One projection's LoRA: ``dW = (alpha / r) B A``; a conv's kernel; DoRA's ``m``.

    Without an ``alpha`` it is the rank: the scale is folded into ``B``, and every reader multiplies by 1.
    """

    component: str
    path: str
    down: Tensor
    up: Tensor
    kernel: list[int] | None
    magnitude: Tensor | None = None
    alpha: int | None = None

    @property
    def rank(self) -> int:
        """``r``."""
        return self.down.shape[0]

    def shaped(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The factors as files hold them: 2-D for linear layers, 4-D for convolutions."""
        down, up = self.down.to(dtype), self.up.to(dtype)
        if self.kernel is None:
            return down.contiguous(), up.contiguous()
        return down.view(-1, *self.kernel).contiguous(), up[:, :, None, None].contiguous()

    def peft_tensors(self, key: str, dtype: torch.dtype) -> Tensors:
        """Under PEFT's names: ``lora_A``, ``lora_B`` and, ``[d_out]`` or ``[1, d_out, 1, 1]``, the magnitude."""
        down, up = self.shaped(dtype)
        tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        if self.magnitude is not None:
            m = self.magnitude.to(dtype)
            tensors[f"{key}.lora_magnitude_vector.weight"] = m if self.kernel is None else m.view(1, -1, 1, 1)
        return tensors

    def kohya_tensors(self, key: str, dtype: torch.dtype) -> Tensors:
        """Under kohya's names: ``lora_down``, ``lora_up``, ``alpha`` and, ``[d_out, 1(, 1, 1)]``, ``dora_scale``."""
        down, up = self.shaped(dtype)
        tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(float(self.alpha or self.rank))  # in fp32: bf16 has no 257
        if self.magnitude is not None:
            tensors[f"{key}.dora_scale"] = self.magnitude.to(dtype).view(-1, *(1 for _ in down.shape[1:]))
        return tensors

    def error(self, dtype: torch.dtype) -> tuple[float, float]:
        """``(max |dW_file - dW|, max |dW|)`` in fp64."""
        scale = (self.alpha or self.rank) / self.rank
        exact = scale * (self.up @ self.down)
        stored = scale * (self.up.to(dtype).double() @ self.down.to(dtype).double())
        return float((stored - exact).abs().max()), float(exact.abs().max())


def with_one_alpha(pairs: Sequence[PlainPair]) -> list[PlainPair]:
    """The same updates with the largest rank as everybody's alpha: diffusers loses kohya's alphas where they differ."""
    alpha = max(pair.rank for pair in pairs)
    return [replace(pair, up=pair.up * (pair.rank / alpha), alpha=alpha) for pair in pairs]


def _long_path(pair: PlainPair) -> str:
    """The path that other tools expect: CLIP text encoders always with ``text_model.``, T5 without."""
    path = canonical(pair.path)
    return f"text_model.{path}" if _is_clip(pair) else path


def _is_clip(pair: PlainPair) -> bool:
    return pair.component.startswith("text_encoder") and canonical(pair.path).startswith("encoder.layers.")


def _peft_path(pair: PlainPair) -> str:
    """The path in the model itself: PEFT reads no other, and transformers has moved CLIP's layers about."""
    return _clip_prefix(pair.component) + canonical(pair.path) if _is_clip(pair) else canonical(pair.path)


@functools.cache
def _clip_prefix(component: str) -> str:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        kind = CLIPTextModelWithProjection if component == "text_encoder_2" else CLIPTextModel
        layers = [name for name, _ in kind(CLIPTextConfig(num_hidden_layers=1)).named_parameters()]
    return "text_model." if any(name.startswith("text_model.encoder.") for name in layers) else ""


FOREIGN = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".gguf", ".onnx")


def file_target(dst: Path) -> Path:
    """The file that a destination means: a folder gets ``lora.safetensors``.

    Raises :class:`UserError` for the name of another kind of file.
    """
    if dst.suffix in FOREIGN and not dst.is_dir():
        raise UserError(f"{dst} is no name for it: safetensors is written only, so let it end in .safetensors")
    return dst if dst.suffix == ".safetensors" else dst / "lora.safetensors"


def files_of(format: Format, dst: Path, info: AdapterInfo) -> list[Path]:
    """What an export writes, new tokens aside."""
    if format == "peft":
        if dst.suffix == ".safetensors":
            raise UserError(f"PEFT's format is a folder with files of fixed names: name one in place of {dst}")
        return [dst / component / name for component in info.components for name in (PEFT_FILE, PEFT_CONFIG)]
    return [file_target(dst)]


def require_replaceable(files: Iterable[Path]) -> None:
    """Raise :class:`UserError` where something else than an older export of ours would be overwritten."""
    for file in files:
        if file.exists() and not _is_export(file.with_name(PEFT_FILE) if file.name == PEFT_CONFIG else file):
            raise UserError(f"{file} exists and is no export of {MAKER}: choose another name")


def _is_export(file: Path) -> bool:
    try:
        with TensorFile(file) as reader:
            return reader.metadata.get("made_by") == MAKER
    except UserError:
        return False


def _write_diffusers(dst: Path, info: AdapterInfo, pairs: list[PlainPair], dtype: torch.dtype) -> tuple[Path, int, int]:
    tensors: Tensors = {}
    for pair in pairs:
        tensors |= pair.peft_tensors(f"{pair.component}.{_long_path(pair)}", dtype)
    settings = {part: _lora_settings([p for p in pairs if p.component == part]) for part in info.components}
    notes = {}
    if any(own["rank_pattern"] for own in settings.values()):  # else diffusers 0.38 takes the first rank for all alphas
        said = {f"{part}.{name}": value for part, own in settings.items() for name, value in own.items()}
        notes["lora_adapter_metadata"] = json.dumps(said)
    return write_tensors(file_target(dst), tensors, info, notes)


def _lora_settings(pairs: Sequence[PlainPair]) -> dict[str, Any]:
    """What PEFT's ``LoraConfig`` has to know of a component's pairs: the ranks, and that each alpha is the rank.

    PEFT looks for the ends of paths: CLIP's, whose beginning depends on transformers' release, are none of others.
    """
    ranks = {pattern_of(canonical(pair.path)): pair.rank for pair in pairs}
    r = max(ranks.values())
    odd = {pattern: rank for pattern, rank in ranks.items() if rank != r}
    return {
        "r": r, "lora_alpha": r, "rank_pattern": odd, "alpha_pattern": odd,
        "target_modules": sorted(canonical(pair.path) for pair in pairs),
        "use_dora": any(pair.magnitude is not None for pair in pairs),
    }  # fmt: skip


def _is_one_of_two(info: AdapterInfo, pairs: list[PlainPair]) -> bool:
    """Whether the base has a second text encoder (SDXL): adapted as well, or read by the UNet beside the first."""
    widths = {pair.component: pair.down.shape[1] for pair in pairs if pair.path.endswith(("attn2.to_k", "q_proj"))}
    return "text_encoder_2" in info.components or widths.get("unet", 0) > widths.get("text_encoder", math.inf)


def _write_kohya(dst: Path, info: AdapterInfo, pairs: list[PlainPair], dtype: torch.dtype) -> tuple[Path, int, int]:
    prefixes = {"unet": "lora_unet", "text_encoder_2": "lora_te2"}
    prefixes["text_encoder"] = "lora_te1" if _is_one_of_two(info, pairs) else "lora_te"
    tensors: Tensors = {}
    for pair in pairs:
        if pair.component not in prefixes:
            raise UserError(f"kohya files have no name for {pair.component}: export to diffusers instead")
        tensors |= pair.kohya_tensors(f"{prefixes[pair.component]}_{_long_path(pair).replace('.', '_')}", dtype)
    return write_tensors(file_target(dst), tensors, info)


def _write_peft(dst: Path, info: AdapterInfo, pairs: list[PlainPair], dtype: torch.dtype) -> tuple[Path, int, int]:
    from peft import LoraConfig

    size = keys = 0
    for component in info.components:
        mine = [pair for pair in pairs if pair.component == component]
        tensors: Tensors = {}
        for pair in mine:
            tensors |= pair.peft_tensors(f"base_model.model.{_peft_path(pair)}", dtype)
        settings = _lora_settings(mine)
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
    """Write one file that says where it comes from, and ``more``; returns its path, bytes and number of tensors."""
    notes = {"trigger": info.trigger, "base": info.base, "source_sha256": info.sha256, "made_by": MAKER}
    metadata = {"format": "pt", **{k: v for k, v in notes.items() if v}, **(more or {})}
    if info.trigger:
        metadata["modelspec.trigger_phrase"] = info.trigger
    write_atomic(path, save(tensors, metadata))
    return path, path.stat().st_size, len(tensors)


WRITERS: dict[str, Callable[[Path, AdapterInfo, list[PlainPair], torch.dtype], tuple[Path, int, int]]] = {
    "diffusers": _write_diffusers,
    "kohya": _write_kohya,
    "peft": _write_peft,
}
"""``(destination, info, pairs, dtype) -> (what was written, bytes, number of tensors)``."""
