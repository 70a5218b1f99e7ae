"""Exact export to plain LoRA files that other tools read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..adapters import AdapterConfig
from ..adapters.deltas.chain import ChainDelta
from ..adapters.tuner.build import delta_of_file
from ..adapters.tuner.rank_mask import check_rank
from ..errors import UserError
from ..formats.adapter_file import AdapterInfo, Tensors, inspect_adapter, read_tensors
from ..formats.keys import Projection, factors_by_projection, token_vectors
from ..loaders.gates import MeanGates, mean_gates_of_file
from ..pipelines.precision import DTYPES
from .lora_layouts import (
    WRITERS,
    Format,
    PlainPair,
    file_target,
    files_of,
    require_replaceable,
    with_one_alpha,
    write_tensors,
)

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


def export_lora(
    src: str | Path, dst: str | Path, format: Format = "diffusers", dtype: str | None = None,
    basis_dir: str | Path | None = None, rank: int | None = None, gate: Gate | None = None, pipe: Any = None,
    calibration: Sequence[str] | None = None,
) -> ExportReport:  # fmt: skip
    """Write an adapter as a plain LoRA of rank ``r'``: ``A = A_in A_out``, ``B = (alpha/r) B_out B_in``.

    ``format``: ``diffusers`` (``pipe.load_lora_weights``), ``kohya`` (A1111, ComfyUI ...), ``peft`` (a folder with one
    subfolder a component). ``dtype``: fp32 (default), fp16 or bf16. ``rank`` cuts an adapter that was trained for every
    rank (DyLoRA). A magnitude is written as these formats name it (DoRA). Products are formed in fp64. ``basis_dir``:
    where a shared basis lies, if not beside the adapter.

    A routed adapter (MoR, MoE-LoRA) has no exact LoRA and is refused, unless ``gate="mean"`` fixes each layer's gate at
    its mean over the prompts ``calibration`` (default: generic ones), for which the adapter's base is needed as
    ``pipe``; the report then says what that costs.

    New tokens go into a textual inversion each: ``dog_lora_emb_sks.safetensors`` beside ``dog_lora.safetensors``.
    An older export is replaced; any other file in the way is left alone: :class:`UserError`, as for what cannot be
    exported.
    """
    if format not in get_args(Format):
        raise UserError(f"format={format!r} is unknown: choose one of {', '.join(get_args(Format))}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    info = inspect_adapter(src)
    dst = Path(dst).expanduser()
    embeddings = _embedding_files(dst, info)
    require_replaceable([*files_of(format, dst, info), *embeddings.values()])
    gates = _fixed_gates(info, gate, pipe, calibration, basis_dir)
    tensors = read_tensors(info, basis_dir)
    pairs = plain_pairs(info, tensors, rank, gates)
    if format == "kohya":
        pairs = with_one_alpha(pairs)
    stored = DTYPES[dtype or "fp32"]
    path, size, keys = WRITERS[format](dst, info, pairs, stored)
    _write_embeddings(embeddings, info, tensors, stored)
    errors = [pair.error(stored) for pair in pairs]
    worst, largest = max(e for e, _ in errors), max(w for _, w in errors)
    relative = worst / largest if largest else 0.0
    widest = max(pair.rank for pair in pairs)
    notes = [_note(info, format, pairs) if gates is None else gates.describe(), _note_on_t5(format, pairs)]
    note = "; ".join(filter(None, [*notes, _note_on(embeddings)]))
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
    if not any(config.frozen_outer for config in info.configs.values()) and numbers > info.trained_parameters:
        low, high = (pick(pair.rank for pair in pairs) for pick in (min, max))
        ranks = str(high) if low == high else f"{low} to {high}"
        notes.append(
            f"as a plain LoRA this {info.method} adapter has its full rank, {ranks}, and so {numbers:,} numbers for "
            f"{info.trained_parameters:,} trained ones"
        )
    if any(pair.magnitude is not None for pair in pairs):
        names = {"kohya": "dora_scale, which diffusers leaves out: export to diffusers for it"}
        notes.append(f"a DoRA with its magnitude as {names.get(format, 'lora_magnitude_vector')}")
    return "; ".join(notes)


def _note_on_t5(format: Format, pairs: list[PlainPair]) -> str:
    """What diffusers leaves out without a word."""
    t5 = any(p.component.startswith("text_encoder") and p.path.startswith("encoder.block.") for p in pairs)
    if format != "diffusers" or not t5:
        return ""
    return "its T5 part is read by PEFT only: pipe.load_lora_weights leaves it out"


EMBEDDING_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def _embedding_files(dst: Path, info: AdapterInfo) -> dict[str, Path]:
    """The file of each new token. Raises :class:`UserError` where other tools have no name for one."""
    place = file_target(dst)
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
    for word, own in token_vectors(info.tokens, tensors).items():
        names = EMBEDDING_KEYS if len(own) > 1 else dict.fromkeys(own, "emb_params")
        vectors = {names[part]: value.to(dtype).contiguous() for part, value in own.items()}
        write_tensors(files[word], vectors, replace(info, trigger=word))


def _note_on(embeddings: dict[str, Path]) -> str:
    if not embeddings:
        return ""
    files = ", ".join(f"{word} in {file.name}" for word, file in embeddings.items())
    return f"it needs its new tokens: {files} (a textual inversion, to be loaded as well)"


def plain_pairs(
    info: AdapterInfo, tensors: Tensors, rank: int | None = None, gates: MeanGates | None = None
) -> list[PlainPair]:
    """The plain LoRA pair of every projection, in fp64, cut to ``rank`` where the adapter was trained for that."""
    pairs, by_projection = [], factors_by_projection(tensors)
    for component, config in info.configs.items():
        if rank is not None:
            check_rank(config, rank)
        pairs += [
            _plain_pair(info, config, projection, factors, rank, gates)
            for projection, factors in sorted(by_projection.items(), key=lambda item: item[0])
            if projection[0] == component
        ]
    return pairs


def _plain_pair(
    info: AdapterInfo, config: AdapterConfig, projection: Projection, factors: Tensors, rank: int | None,
    gates: MeanGates | None,
) -> PlainPair:  # fmt: skip
    (component, path), full = projection, ".".join(projection)
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
