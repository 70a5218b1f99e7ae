"""``nora-diffusion inspect``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..errors import UserError

HELP = "describe an adapter file, without loading a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("adapter", help="adapter file or folder")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    parser.add_argument(
        "--overlap", metavar="OTHER", help="measure how much it changes the same directions as another adapter"
    )
    parser.add_argument("--layers", action="store_true", help="describe its update of each layer (loads its base)")
    parser.add_argument("--intruders", action="store_true", help="with --layers: count intruder dimensions (slower)")
    parser.add_argument(
        "--base", help="with --layers: folder or hub id of its base (default: the one named in the file)"
    )


def run(values: argparse.Namespace) -> None:
    """Print the description."""
    from dataclasses import asdict

    from ..formats.adapter_file import inspect_adapter, layer_ranks, verify_adapter
    from ..reports.layer_ranks import ranks_text

    if (values.intruders or values.base) and not values.layers:
        raise UserError("--intruders and --base need --layers: give it as well")
    info = inspect_adapter(values.adapter)
    verify_adapter(info)
    layers = _layers(values) if values.layers else []
    overlap = _overlap(values) if values.overlap else {}
    ranks = layer_ranks(values.adapter)
    if values.json:
        more = ({"layers": [asdict(layer) for layer in layers]} if layers else {}) | overlap
        more |= {"layer_ranks": {f"{component}.{path}": r for (component, path), r in ranks.items()}} if ranks else {}
        print(json.dumps(asdict(info) | more, indent=2))
        return
    rows = {
        "file": info.path,
        **({"note": info.note} if info.note else {}),
        "method": f"{info.method}, {info.ranks}",
        "base": info.base,
        "components": ", ".join(info.components),
        "trigger": info.trigger or "none",
        **({"new tokens": _tokens(info)} if info.tokens else {}),
        "class word": info.class_word or "none",
        "parameters": f"{info.trained_parameters:,} trained of {info.stored_parameters:,} stored",
        "basis": info.basis + (f" {info.basis_sha256}" if info.basis_sha256 else ""),
        "step, seed": f"{info.step}, {info.seed}",
        "size": f"{info.bytes:,} bytes",
        "sha256": info.sha256,
        "made with": ", ".join(f"{k} {v}" for k, v in info.versions.items()),
    }
    if overlap:
        rows["overlap"] = f"{overlap['overlap']:.3f} with {values.overlap} (0: none, 1: the same directions)"
    for name, value in rows.items():
        print(f"{name:<16} {value}")
    if ranks:
        print("\n" + ranks_text(ranks))
    if layers:
        from ..evaluation.spectra import table

        print("\n" + table(layers))


def _tokens(info: Any) -> str:
    return ", ".join(f"{token} ({' and '.join(encoders)})" for token, encoders in info.tokens.items())


def _layers(values: argparse.Namespace) -> list[Any]:
    from ..evaluation.spectra import spectra
    from ..pipelines.base import open_pipeline

    return spectra(values.adapter, open_pipeline(values.base) if values.base else None, values.intruders)


def _overlap(values: argparse.Namespace) -> dict[str, Any]:
    from ..composition.angles import overlap_files

    overlap = overlap_files(values.adapter, values.overlap)
    return {
        "overlap": overlap.score,
        "overlap_layers": {f"{component}.{path}": score for (component, path), score in overlap.layers.items()},
    }
