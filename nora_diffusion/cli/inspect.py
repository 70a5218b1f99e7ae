"""``nora-diffusion inspect``."""

from __future__ import annotations

import argparse
import json

HELP = "say what an adapter file holds, without loading a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    parser.add_argument("adapter", help="adapter file or folder")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")


def run(values: argparse.Namespace) -> None:
    """Print the description."""
    from dataclasses import asdict

    from ..adapter_file import inspect_adapter

    info = inspect_adapter(values.adapter)
    if values.json:
        print(json.dumps(asdict(info), indent=2))
        return
    rows = {
        "file": info.path,
        "method": f"{info.method}, r = {info.r}" + (f", r' = {info.inner_r}" if info.method == "nora" else ""),
        "base": info.base,
        "parts": ", ".join(info.components),
        "trigger": info.trigger or "none",
        "class word": info.class_word or "none",
        "trained numbers": f"{info.trained_numbers:,} of {info.stored_numbers:,} stored",
        "basis": info.basis + (f" {info.basis_sha256}" if info.basis_sha256 else ""),
        "step, seed": f"{info.step}, {info.seed}",
        "size": f"{info.bytes:,} bytes",
        "sha256": info.sha256,
        "made with": ", ".join(f"{k} {v}" for k, v in info.versions.items()),
    }
    for name, value in rows.items():
        print(f"{name:<16} {value}")
