"""Exact export to plain LoRA files that other tools read."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save
from torch import Tensor

from .adapter_file import DTYPES, AdapterInfo, Tensors, inspect_adapter, read_tensors
from .adapters import AdapterConfig
from .adapters.build import delta_of_file
from .adapters.deltas import ChainDelta
from .adapters.rank_mask import check_rank
from .components import canonical
from .errors import UserError
from .files import write_atomic
from .gates import MeanGates, mean_gates_of_file
from .loaders.tokens import words_in

Format = Literal["diffusers", "kohya", "peft"]
Gate = Literal["mean"]


@dataclass
class ExportReport:
    """What was written: files, rank, and the measured ``max |dW_file - dW|`` (absolute, and relative to max |dW|).

    ``dW`` is the low-rank part; a magnitude is copied. ``note`` says what is particular to the file. ``gates``: the
    fixed gates of a routed adapter and the measured error that fixing them costs. ``embeddings``: a file for each new
    token, which plain LoRAs have no place for.
    """

    path: Path
    format: str
    rank: int
    max_error: float
    relative_error: float
    bytes: int
    keys: int
    note: str = ""
    gates: MeanGates | None = None
    embeddings: tuple[Path, ...] = ()


@dataclass
class PlainPair:
    """One projection's LoRA: ``dW = B A`` with the scale folded into ``B``; a conv's kernel; DoRA's ``m``."""

    component: str
    path: str
    down: Tensor
    up: Tensor
    kernel: list[int] | None
    magnitude: Tensor | None = None

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
        # The scale is folded into B, so alpha equals the rank and every reader multiplies by 1.
        tensors[f"{key}.alpha"] = torch.tensor(float(down.shape[0]), dtype=dtype)
        if self.magnitude is not None:
            tensors[f"{key}.dora_scale"] = self.magnitude.to(dtype).view(-1, *(1 for _ in down.shape[1:]))
        return tensors

    def error(self, dtype: torch.dtype) -> tuple[float, float]:
        """``(max |dW_file - dW|, max |dW|)`` in fp64."""
        exact = self.up @ self.down
        stored = self.up.to(dtype).double() @ self.down.to(dtype).double()
        return float((stored - exact).abs().max()), float(exact.abs().max())


def export_lora(
    src: str | Path, dst: str | Path, format: Format = "diffusers", dtype: str | None = None,
    basis_dir: str | Path | None = None, rank: int | None = None, gate: Gate | None = None, pipe: Any = None,
    calibration: Sequence[str] | None = None,
) -> ExportReport:  # fmt: skip
    """Write an adapter as a plain LoRA of rank ``r'``: ``A = A_in A_out``, ``B = (alpha/r) B_out B_in``.

    ``format``: ``diffusers`` (``pipe.load_lora_weights``), ``kohya`` (A1111, ComfyUI ...), ``peft`` (a folder with one
    subfolder a component). ``dtype``: fp32 (default), fp16 or bf16. ``rank`` cuts an adapter that was trained for every
    rank (DyLoRA). A magnitude is written as these formats name it (DoRA). Products are formed in fp64.

    A routed adapter (MoR, MoE-LoRA) has no exact LoRA and is refused, unless ``gate="mean"`` fixes each layer's gate at
    its mean over the prompts ``calibration`` (default: generic ones), for which the adapter's base is needed as
    ``pipe``; the report then says what that costs.

    New tokens go into a textual inversion each: ``dog_lora_emb_sks.safetensors`` beside ``dog_lora.safetensors``.
    Raises :class:`UserError`.
    """
    if format not in get_args(Format):
        raise UserError(f"format={format!r} is unknown: choose one of {', '.join(get_args(Format))}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    info = inspect_adapter(src)
    gates = _fixed_gates(info, gate, pipe, calibration, basis_dir)
    tensors = read_tensors(info, basis_dir)
    pairs = plain_pairs(info, tensors, rank, gates)
    stored = DTYPES[dtype or "fp32"]
    dst = Path(dst).expanduser()
    embeddings = _embedding_files(dst, info)
    path, size, keys = WRITERS[format](dst, info, pairs, stored)
    _write_embeddings(embeddings, info, tensors, stored)
    errors = [pair.error(stored) for pair in pairs]
    worst, largest = max(e for e, _ in errors), max(w for _, w in errors)
    relative = worst / largest if largest else 0.0
    widest = max(pair.down.shape[0] for pair in pairs)
    notes = [_note(info, format, pairs) if gates is None else gates.describe(), _note_on(embeddings)]
    note = "; ".join(filter(None, notes))
    return ExportReport(path, format, widest, worst, relative, size, keys, note, gates, tuple(embeddings.values()))


def _fixed_gates(
    info: AdapterInfo, gate: Gate | None, pipe: Any, calibration: Sequence[str] | None, basis_dir: str | Path | None
) -> MeanGates | None:
    """The mean gates of a routed adapter, measured; None for any other. Refuses what was not asked for."""
    routed = any(config.router != "none" for config in info.configs.values())
    if not routed and gate is None:
        return None
    if not routed:
        raise UserError(f"{info.path} is a {info.method} adapter, which has no gate to fix: leave gate={gate!r} out")
    if gate != "mean":
        raise UserError(
            f"{info.path} is a {info.method} adapter: its gate depends on its input, so no plain LoRA equals it; "
            "load it with nora_diffusion instead, or accept an approximation with gate='mean'"
        )
    if pipe is None:
        raise UserError("gate='mean' is measured: give the adapter's base as pipe")
    return mean_gates_of_file(pipe, info.path, calibration, basis_dir)


def _note(info: AdapterInfo, format: Format, pairs: list[PlainPair]) -> str:
    notes = []
    numbers = sum(pair.down.numel() + pair.up.numel() for pair in pairs)
    if not any(config.frozen_outer for config in info.configs.values()) and numbers > info.trained_numbers:
        low, high = (pick(pair.down.shape[0] for pair in pairs) for pick in (min, max))
        ranks = str(high) if low == high else f"{low} to {high}"
        notes.append(
            f"as a plain LoRA this {info.method} adapter has its full rank, {ranks}, and so {numbers:,} numbers for "
            f"{info.trained_numbers:,} trained ones"
        )
    if any(pair.magnitude is not None for pair in pairs):
        names = {"kohya": "dora_scale, which diffusers leaves out: export to diffusers for it"}
        notes.append(f"a DoRA with its magnitude as {names.get(format, 'lora_magnitude_vector')}")
    return "; ".join(notes)


EMBEDDING_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def _embedding_files(dst: Path, info: AdapterInfo) -> dict[str, Path]:
    """The file of each new token. Raises :class:`UserError` where other tools have no name for one."""
    place = _file_target(dst)
    names = {word: re.sub(r"\W+", "_", word).strip("_") or "token" for word in info.tokens}
    if len(set(names.values())) < len(names):
        raise UserError(
            f"the new tokens {', '.join(names)} would be written to one file: other tools know only one name"
        )
    if any(len(parts) > 1 and not set(parts) <= EMBEDDING_KEYS.keys() for parts in info.tokens.values()):
        raise UserError("embedding files of other tools have no place for the tokens of these text encoders")
    return {word: place.with_name(f"{place.stem}_emb_{name}.safetensors") for word, name in names.items()}


def _write_embeddings(files: dict[str, Path], info: AdapterInfo, tensors: Tensors, dtype: torch.dtype) -> None:
    """As A1111, ComfyUI and diffusers lay them out: ``emb_params [n, width]``, or ``clip_l`` and ``clip_g``."""
    for word, own in words_in(info.tokens, tensors).items():
        names = EMBEDDING_KEYS if len(own) > 1 else dict.fromkeys(own, "emb_params")
        vectors = {names[part]: value.to(dtype).contiguous() for part, value in own.items()}
        _write(files[word], vectors, replace(info, trigger=word))


def _note_on(embeddings: dict[str, Path]) -> str:
    if not embeddings:
        return ""
    files = ", ".join(f"{word} in {file.name}" for word, file in embeddings.items())
    return f"it needs its new tokens: {files} (a textual inversion, to be loaded as well)"


def plain_pairs(
    info: AdapterInfo, tensors: Tensors, rank: int | None = None, gates: MeanGates | None = None
) -> list[PlainPair]:
    """The plain LoRA pair of every projection, in fp64, cut to ``rank`` where the adapter was trained for that."""
    pairs = []
    for component, config in info.configs.items():
        if rank is not None:
            check_rank(config, rank)
        start = f"{component}."
        places = {key.rsplit(".nora_", 1)[0] for key in tensors if key.startswith(start)}
        pairs += [
            _plain_pair(info, component, config, full.removeprefix(start), tensors, rank, gates)
            for full in sorted(places)
        ]
    return pairs


def _plain_pair(
    info: AdapterInfo, component: str, config: AdapterConfig, path: str, tensors: Tensors, rank: int | None,
    gates: MeanGates | None,
) -> PlainPair:  # fmt: skip
    full = f"{component}.{path}"
    factors = {key.removeprefix(f"{full}.nora_"): v for key, v in tensors.items() if key.startswith(f"{full}.nora_")}
    delta = delta_of_file(config, path, factors, info.shapes.get(full)).double()
    if isinstance(delta, ChainDelta):
        delta.rank = rank
        pair = delta.pair()
    else:
        assert gates is not None
        pair = delta.pair(gates.gates[full].double())
    down, up = (factor.detach() for factor in pair)
    magnitude = delta.m.detach() if isinstance(delta, ChainDelta) and delta.m is not None else None
    return PlainPair(component, path, down, up * config.scale_for(path), info.conv_shapes.get(full), magnitude)


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


def _file_target(dst: Path) -> Path:
    return dst if dst.suffix == ".safetensors" else dst / "lora.safetensors"


def _write_diffusers(dst: Path, info: AdapterInfo, pairs: list[PlainPair], dtype: torch.dtype) -> tuple[Path, int, int]:
    tensors: Tensors = {}
    for pair in pairs:
        tensors |= pair.peft_tensors(f"{pair.component}.{_long_path(pair)}", dtype)
    return _write(_file_target(dst), tensors, info)


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
    return _write(_file_target(dst), tensors, info)


def _write_peft(dst: Path, info: AdapterInfo, pairs: list[PlainPair], dtype: torch.dtype) -> tuple[Path, int, int]:
    from peft import LoraConfig

    size = keys = 0
    for component in info.components:
        mine = [pair for pair in pairs if pair.component == component]
        tensors: Tensors = {}
        for pair in mine:
            tensors |= pair.peft_tensors(f"base_model.model.{_peft_path(pair)}", dtype)
        ranks = {_peft_path(pair): int(pair.down.shape[0]) for pair in mine}
        r = max(ranks.values())
        odd = {path: rank for path, rank in ranks.items() if rank != r}
        config = LoraConfig(
            r=r, lora_alpha=r, target_modules=sorted(ranks), rank_pattern=odd, alpha_pattern=dict(odd),
            use_dora=any(pair.magnitude is not None for pair in mine),
        )  # fmt: skip
        values = config.to_dict() | {"target_modules": sorted(ranks), "inference_mode": True}
        write_atomic(dst / component / "adapter_config.json", json.dumps(values, indent=2, default=str))
        _, written, count = _write(dst / component / "adapter_model.safetensors", tensors, info)
        size, keys = size + written, keys + count
    return dst, size, keys


def _write(path: Path, tensors: Tensors, info: AdapterInfo) -> tuple[Path, int, int]:
    notes = {"trigger": info.trigger, "base": info.base, "source_sha256": info.sha256, "made_by": "nora_diffusion"}
    metadata = {"format": "pt", **{k: v for k, v in notes.items() if v}}
    if info.trigger:
        metadata["modelspec.trigger_phrase"] = info.trigger
    write_atomic(path, save(tensors, metadata))
    return path, path.stat().st_size, len(tensors)


WRITERS: dict[str, Callable[[Path, AdapterInfo, list[PlainPair], torch.dtype], tuple[Path, int, int]]] = {
    "diffusers": _write_diffusers,
    "kohya": _write_kohya,
    "peft": _write_peft,
}
