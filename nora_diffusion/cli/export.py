"""``nora-diffusion export``."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "export an adapter as a plain LoRA for other tools"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    from ..training.settings.checks import EXPORT_FORMATS

    parser.add_argument("adapter", help="adapter file or folder")
    parser.add_argument("out", help="file to write, or a folder for --format peft; an older export is replaced")
    parser.add_argument("--format", choices=EXPORT_FORMATS, default="diffusers",
                        help="key names: for pipe.load_lora_weights; for A1111 and ComfyUI; for PEFT")  # fmt: skip
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="dtype of the file")
    parser.add_argument("--gate", choices=("mean",), help="fix a mixture's gates at their mean over prompts")
    parser.add_argument(
        "--calibration_prompts", nargs="+", metavar="PROMPT", help="prompts to measure it on (default: generic ones)"
    )
    parser.add_argument(
        "--dora",
        choices=("plain", "magnitude"),
        help="a DoRA as a plain LoRA (default for kohya) or with its magnitude (default for the others)",
    )
    parser.add_argument("--base", help="base for --gate and --dora plain: folder or hub id (default: the adapter's)")
    parser.add_argument("--rank", type=int, help="truncate an adapter that was trained for every rank (dylora), or "
                        "the rank of a DoRA's plain LoRA")  # fmt: skip


def run(values: argparse.Namespace) -> None:
    """Export, and print the size and the error."""
    from ..formats.adapter_file import inspect_adapter

    inspect_adapter(values.adapter, hashed=False)  # fails before torch is imported
    from ..conversion.export import export_lora

    report = export_lora(
        values.adapter, values.out, values.format, values.dtype, rank=values.rank, gate=values.gate,
        pipe=_base(values) if values.gate or values.base else None, calibration=values.calibration_prompts,
        dora=values.dora,
    )  # fmt: skip
    print(
        f"{report.path}: rank {report.rank}, {report.keys} tensors, {report.bytes:,} bytes, "
        f"max |dW_file - dW| = {report.max_error:.1e} ({report.relative_error:.1e} of max |dW|)"
        + (f"\n{report.note}" if report.note else "")
    )


def _base(values: argparse.Namespace) -> Any:
    from ..formats.adapter_file import inspect_adapter
    from ..pipelines.base import open_pipeline

    return open_pipeline(values.base or inspect_adapter(values.adapter).base)
