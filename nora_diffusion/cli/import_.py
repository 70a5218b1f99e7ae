"""``nora-diffusion import``."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "project a LoRA of another tool onto a NoRA basis and print the error"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("lora", help="LoRA, LoHa or LoKr file (safetensors) or folder")
    parser.add_argument("out", help="folder for the adapter")
    parser.add_argument("--base", help="pipeline folder or hub id (default: the embedded base)")
    parser.add_argument("--method", choices=("nora", "nora_input", "lora_xs"), default="nora",
                        help="adapter to make")  # fmt: skip
    parser.add_argument("--rank", type=int, default=32, help="outer rank r of the basis")
    parser.add_argument("--inner_rank", type=int, default=4, help="inner rank r' (nora, nora_input)")
    parser.add_argument("--basis", choices=("svd", "awsvd", "learned", "orthogonal"), default="svd",
                        help="frozen outer pair to project onto")  # fmt: skip
    parser.add_argument("--basis_from", metavar="ADAPTER", help="adapter whose basis is reused, with the same --basis")
    parser.add_argument("--seed", type=int, default=0, help="seed of the orthogonal basis, which is random")
    parser.add_argument("--trigger", help="trigger word, if the file does not record it")


def run(values: argparse.Namespace) -> None:
    """Import, and print the relative error of each layer, worst first, and the total."""
    from ..adapters.presets import PRESETS, options
    from ..formats.adapter_file import inspect_adapter, require_vacant
    from ..pipelines.base import open_pipeline

    inspect_adapter(values.lora, hashed=False)  # fails before torch is imported
    require_vacant(Path(values.out).expanduser())
    from ..conversion.import_lora import import_lora

    inner = {"inner_r": values.inner_rank} if "inner_r" in options(values.method) else {}
    config = PRESETS[values.method](r=values.rank, basis=values.basis, **inner)
    info = {"trigger": values.trigger} if values.trigger else None
    pipe = open_pipeline(values.base)
    report = import_lora(pipe, values.lora, values.out, config, info, values.seed, values.basis_from)
    for path, lost in sorted(report.layers.items(), key=lambda item: -item[1]):
        print(f"{lost:9.2e}  {path}")
    print(f"{report.path}: ||dW - dW'|| / ||dW|| = {report.lost:.2e} over {len(report.layers)} projections")
    if report.note:
        print(report.note)
