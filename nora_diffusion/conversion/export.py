"""Export of adapters to plain LoRA files: exact, but for DoRAs and routed adapters, whose error is measured."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..adapters import AdapterConfig
from ..adapters.deltas.chain import ChainDelta
from ..adapters.tuner.build import delta_of_file
from ..adapters.tuner.rank_mask import check_rank
from ..errors import UserError
from ..formats.adapter_file import inspect_adapter, read_tensors
from ..formats.adapter_info import AdapterInfo
from ..formats.foreign import EMBEDDING_KEY, EMBEDDING_KEYS
from ..formats.keys import Projection, factors_by_projection, token_vectors
from ..io.tensors import Tensors
from ..loaders.gates import MeanGates, mean_gates_of_file
from ..pipelines.precision import DTYPES, check_dtype
from .dora import base_weights, truncated
from .lora_layouts import (
    WRITERS,
    Format,
    export_file,
    export_files,
    require_replaceable,
    write_tensors,
)
from .plain_pair import PlainPair, with_common_alpha

Gate = Literal["mean"]
Dora = Literal["plain", "magnitude"]
MAGNITUDE_NOTES = {
    "diffusers": "a DoRA with its magnitude as lora_magnitude_vector: diffusers and PEFT compute the adapter; ComfyUI "
    "ignores the magnitude, and the UNet's attention under these names",
    "kohya": "a DoRA with its magnitude as dora_scale, with which no client computes this adapter: ComfyUI and Forge "
    "divide by the row norms of the base's weight, AUTOMATIC1111 by the norms of columns, sd-scripts ignores it",
    "peft": "a DoRA with its magnitude as lora_magnitude_vector: PEFT computes the adapter",
}
"""What each client computes with a magnitude, by format."""
OUTSIDE = ("conv_in", "conv_out", "time_embedding.", "add_embedding.", "class_embedding.")
"""A UNet's layers outside of its blocks."""


@dataclass
class ExportReport:
    """What was written, and the measured ``max |dW_file - dW|`` (absolute, and relative to ``max |dW|``).

    ``dW`` is the low-rank update if a magnitude is copied, else the whole update. ``lost``: ``||dW_file - dW||_F /
    ||dW||_F`` over all projections. ``note``: remarks about the file. ``gates``: the fixed gates
    of a routed adapter and the measured error of fixing them. ``embeddings``: a textual inversion file for each new
    token, because a plain LoRA cannot hold it.
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
    lost: float = 0.0


def export_lora(
    src: str | Path, dst: str | Path, format: Format = "diffusers", dtype: str | None = None,
    basis_dir: str | Path | None = None, rank: int | None = None, gate: Gate | None = None, pipe: Any = None,
    calibration: Sequence[str] | None = None, dora: Dora | None = None,
) -> ExportReport:  # fmt: skip
    """Write an adapter as a plain LoRA of rank ``r'``: ``A = A_in A_out``, ``B = (alpha/r) B_out B_in``.

    ``format``: ``diffusers`` (for ``pipe.load_lora_weights``), ``kohya`` (A1111, ComfyUI ...) or ``peft`` (a folder
    with one subfolder per component). ``dtype``: fp32 (default), fp16 or bf16. ``rank`` truncates an adapter that was
    trained for every rank (DyLoRA). Products are computed in fp64. ``basis_dir``: the folder of a shared basis, if it
    is not beside the adapter.

    A magnitude (DoRA) is written as such with ``dora="magnitude"``, the default for diffusers and PEFT, which compute
    the adapter with it. No reader of kohya's format does, so there the default is ``dora="plain"``: a plain LoRA whose
    rank is ``rank``, or else the smallest within 1% of each update, at most 128. This needs the base's weights: those
    of ``pipe``, or of the base that the file names.

    A routed adapter (MoR, MoE-LoRA) has no exact LoRA. ``gate="mean"`` approximates it: each layer's gate is fixed at
    its mean over the prompts ``calibration`` (default: generic ones). This needs the adapter's base as ``pipe``; the
    report states the error.

    Each new token is written to a textual inversion file, ``dog_lora_emb_sks.safetensors`` beside
    ``dog_lora.safetensors``. An older export is replaced. Raises :class:`UserError` if any other file would be
    overwritten, for unknown options, and for a routed adapter without ``gate``.
    """
    if format not in get_args(Format):
        raise UserError(f"format={format!r} is unknown: choose one of {', '.join(get_args(Format))}")
    if dtype is not None:
        check_dtype(dtype, DTYPES)
    info = inspect_adapter(src)
    dst = Path(dst).expanduser()
    embeddings = _embedding_files(dst, info)
    require_replaceable([*export_files(format, dst, info), *embeddings.values()])
    plain = _as_plain(info, format, dora)
    if plain and rank is not None and (type(rank) is not int or rank < 1):
        raise UserError(f"rank={rank!r} is not a rank: give a whole number of at least 1")
    gates = _fixed_gates(info, gate, pipe, calibration, basis_dir)
    tensors = read_tensors(info, basis_dir)
    pairs = plain_pairs(info, tensors, rank, gates, base_weights(pipe, info, basis_dir) if plain else None)
    if format == "kohya":
        pairs = with_common_alpha(pairs)
    stored = DTYPES[dtype or "fp32"]
    path, size, keys = WRITERS[format](dst, info, pairs, stored)
    _write_embeddings(embeddings, info, tensors, stored)
    errors = [pair.error(stored) for pair in pairs]
    worst, largest = max(e.worst for e in errors), max(e.largest for e in errors)
    relative = worst / largest if largest else 0.0
    energy = sum(e.energy for e in errors)
    lost = (sum(e.lost for e in errors) / energy) ** 0.5 if energy else 0.0
    widest = max(pair.rank for pair in pairs)
    notes = [
        _note(info, format, pairs) if gates is None else gates.describe(), _note_on_dora(format, pairs, lost),
        _note_on_readers(format, pairs), _note_on_tokens(embeddings),
    ]  # fmt: skip
    note = "; ".join(filter(None, notes))
    return ExportReport(
        path, format, widest, worst, relative, size, keys, note, gates, tuple(embeddings.values()), lost
    )


def _as_plain(info: AdapterInfo, format: Format, dora: Dora | None) -> bool:
    """Whether a magnitude is multiplied into a plain LoRA. Raises :class:`UserError` for an option without effect."""
    if dora not in (None, *get_args(Dora)):
        raise UserError(f"dora={dora!r} is unknown: choose one of {', '.join(get_args(Dora))}")
    if not any(config.magnitude for config in info.configs.values()):
        if dora is not None:
            raise UserError(f"{info.path} is a {info.method} adapter, which has no magnitude: remove dora={dora!r}")
        return False
    return (dora or ("plain" if format == "kohya" else "magnitude")) == "plain"


def _fixed_gates(
    info: AdapterInfo, gate: Gate | None, pipe: Any, calibration: Sequence[str] | None, basis_dir: str | Path | None
) -> MeanGates | None:
    """The mean gates of a routed adapter, measured; ``None`` for other adapters.

    Raises :class:`UserError` for a routed adapter without ``gate``, for any other with one, and without a ``pipe``.
    """
    routed = any(config.router != "none" for config in info.configs.values())
    if not routed and gate is None:
        return None
    if not routed:
        raise UserError(f"{info.path} is a {info.method} adapter, which has no gate to fix: remove gate={gate!r}")
    if gate != "mean":
        raise UserError(
            f"{info.path} is a {info.method} adapter: its gate depends on its input, so no plain LoRA is equal to it; "
            "load it with nora_diffusion instead, or accept an approximation with gate='mean'"
        )
    if pipe is None:
        raise UserError("gate='mean' is measured on the adapter's base: pass it as pipe")
    return mean_gates_of_file(pipe, info.path, calibration, basis_dir)


def _note(info: AdapterInfo, format: Format, pairs: list[PlainPair]) -> str:
    notes = []
    exported = sum(pair.down.numel() + pair.up.numel() for pair in pairs)
    approximate = any(pair.exact for pair in pairs)
    frozen = any(config.frozen_outer for config in info.configs.values())
    if not approximate and not frozen and exported > info.trained_parameters:
        low, high = (pick(pair.rank for pair in pairs) for pick in (min, max))
        ranks = str(high) if low == high else f"{low} to {high}"
        notes.append(
            f"as a plain LoRA this {info.method} adapter has its full rank, {ranks}, and {exported:,} parameters "
            f"instead of {info.trained_parameters:,}"
        )
    return "; ".join(notes)


def _note_on_dora(format: Format, pairs: list[PlainPair], lost: float) -> str:
    if any(pair.magnitude is not None for pair in pairs):
        return MAGNITUDE_NOTES[format]
    ranks = sorted(pair.rank for pair in pairs if pair.exact)
    if not ranks:
        return ""
    span = str(ranks[-1]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
    return f"a DoRA as a plain LoRA of rank {span}: ||dW_file - dW|| / ||dW|| = {lost:.1e} at weight 1"


def _note_on_readers(format: Format, pairs: list[PlainPair]) -> str:
    """Layers that a reader of the format ignores without a warning."""
    notes = []
    if format == "diffusers" and any(pair.is_t5 for pair in pairs):
        notes.append("its T5 layers are read by ComfyUI and load_adapter: pipe.load_lora_weights ignores them")
    outside = sorted({p.path.split(".")[0] for p in pairs if p.component == "unet" and p.path.startswith(OUTSIDE)})
    if format == "kohya" and outside:
        notes.append(f"sd-scripts ignores {', '.join(outside)}; older releases of diffusers refuse them")
    return "; ".join(notes)


def _embedding_files(dst: Path, info: AdapterInfo) -> dict[str, Path]:
    """The textual inversion file of each new token. Raises :class:`UserError` if a token cannot be written as one."""
    file = export_file(dst)
    names = {token: re.sub(r"\W+", "_", token).strip("_") or "token" for token in info.tokens}
    if len(set(names.values())) < len(names):
        raise UserError(f"the new tokens {', '.join(names)} would be written to files of the same name")
    for token, encoders in info.tokens.items():
        if len(encoders) > 1 and not set(encoders) <= EMBEDDING_KEYS.keys():
            raise UserError(f"no file format holds the vectors of {token!r} for {', '.join(encoders)} together")
    return {token: file.with_name(f"{file.stem}_emb_{name}.safetensors") for token, name in names.items()}


def _write_embeddings(files: dict[str, Path], info: AdapterInfo, tensors: Tensors, dtype: torch.dtype) -> None:
    """Write them for A1111, ComfyUI and diffusers: ``emb_params [n, width]``, or ``clip_l`` and ``clip_g``."""
    for token, vectors in token_vectors(info.tokens, tensors).items():
        keys = EMBEDDING_KEYS if len(vectors) > 1 else dict.fromkeys(vectors, EMBEDDING_KEY)
        named = {keys[encoder]: value.to(dtype).contiguous() for encoder, value in vectors.items()}
        write_tensors(files[token], named, replace(info, trigger=token))


def _note_on_tokens(embeddings: dict[str, Path]) -> str:
    if not embeddings:
        return ""
    files = ", ".join(f"{token} in {file.name}" for token, file in embeddings.items())
    return f"also load its new tokens, which are textual inversions: {files}"


def plain_pairs(
    info: AdapterInfo, tensors: Tensors, rank: int | None = None, gates: MeanGates | None = None,
    weights: Mapping[Projection, Tensor] | None = None,
) -> list[PlainPair]:  # fmt: skip
    """The plain LoRA pair of every projection, in fp64; ``rank`` truncates an adapter trained with a rank mask.

    ``weights``: the base's, if magnitudes are multiplied into the pairs; ``rank`` then is the rank of those.
    """
    pairs, by_projection = [], factors_by_projection(tensors)
    for component, config in info.configs.items():
        if rank is not None and not (weights is not None and config.magnitude):
            check_rank(config, rank)
        pairs += [
            _plain_pair(info, config, projection, factors, rank, gates, weights)
            for projection, factors in sorted(by_projection.items(), key=lambda item: item[0])
            if projection[0] == component
        ]
    return pairs


def _plain_pair(
    info: AdapterInfo, config: AdapterConfig, projection: Projection, factors: Tensors, rank: int | None,
    gates: MeanGates | None, weights: Mapping[Projection, Tensor] | None,
) -> PlainPair:  # fmt: skip
    (component, path), full = projection, ".".join(projection)
    delta = delta_of_file(config, path, factors, info.shapes.get(full)).double()
    if isinstance(delta, ChainDelta):
        delta.rank = rank if config.rank_mask else None
        pair = delta.pair()
    else:
        assert gates is not None
        pair = delta.pair(gates.gates[full].double())
    down, up = (factor.detach() for factor in pair)
    up, kernel = up * config.scale_for(path), info.conv_shapes.get(full)
    magnitude = delta.m.detach() if isinstance(delta, ChainDelta) and delta.m is not None else None
    if magnitude is None or weights is None:
        return PlainPair(component, path, down, up, kernel, magnitude)
    down, up, exact = truncated(weights[projection], down, up, magnitude, None if config.rank_mask else rank)
    return PlainPair(component, path, down, up, kernel, exact=exact)
