"""Flags shared by the commands that generate images: which base to open, and the sampling settings."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..pipelines.base import BaseSource

if TYPE_CHECKING:
    from ..generation.settings import Sampling

DTYPES = ("auto", "fp32", "fp16", "bf16")


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of :class:`BaseSource`."""
    parser.add_argument("--base", help="pipeline folder or hub id (default: the embedded base)")
    parser.add_argument("--device", help="cpu, cuda, mps ... (default: the best one available)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of the base; auto: half precision on a GPU, else fp32"
    )
    parser.add_argument("--variant", help="variant of the weight files, for example fp16")
    parser.add_argument("--revision", help="revision of the hub repository")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``Sampling``."""
    parser.add_argument("--steps", type=int, help="denoising steps, 1 to 1000 (default: that of the base)")
    parser.add_argument("--guidance", type=float, help="guidance scale, 0 to 100 (default: that of the base)")
    parser.add_argument("--sampler", help="euler_a, dpmpp_2m_karras ... (default: that of the base)")
    parser.add_argument("--width", type=int, help="width in pixels, a multiple of 8 (default: that of the base)")
    parser.add_argument("--height", type=int, help="height in pixels, a multiple of 8 (default: that of the base)")


def source_of(values: argparse.Namespace) -> BaseSource:
    """The flags as :class:`BaseSource`."""
    return BaseSource(values.base, values.device, values.dtype, values.variant, values.revision)


def sampling_of(values: argparse.Namespace, negative_prompt: str = "") -> Sampling:
    """The flags as ``Sampling``, with the base's defaults."""
    from ..generation.settings import Sampling

    return Sampling.for_base(
        values.base, values.steps, values.guidance, negative_prompt=negative_prompt, width=values.width,
        height=values.height, sampler=values.sampler,
    )  # fmt: skip
