"""``nora-diffusion generate``."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import get_args

from ..generation.retrieval.settings import Auto, AutoMode
from .flags import add_sampling_flags, add_source_flags, sampling_of, source_of

HELP = "generate images with any base and adapters"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument(
        "--prompt", action="append", default=[], help="prompt, with tags like <lora:dog:0.8>; may be repeated"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="PATH[:WEIGHT]",
        help="file, folder, hub id or PACK#NAME (default weight: 1); may be repeated",
    )
    parser.add_argument("--library", metavar="DIR", help="folder of adapters that tags in prompts may name")
    parser.add_argument(
        "--auto",
        type=int,
        metavar="K",
        help="for prompts without tags, choose up to K adapters of --library that suit the prompt",
    )
    parser.add_argument(
        "--auto_mode",
        choices=get_args(AutoMode),
        default="mixture",
        help="how chosen adapters act: the mean of their outputs, the mean of their weights, or only the best "
        "(default: mixture)",
    )
    parser.add_argument("--num", type=int, default=1, help="images per prompt, 1 to 10000")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image; the next ones count up")
    parser.add_argument("--batch", type=int, default=4, help="images at a time; fewer take less memory")
    parser.add_argument("--negative_prompt", default="", help="what to avoid")
    parser.add_argument(
        "--subjects_apart",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let each adapter act on its own subject only where a prompt names several subjects (default: yes)",
    )
    add_sampling_flags(parser)
    add_source_flags(parser)
    parser.add_argument("--out", default="outputs", help="folder for the images; nothing in it is overwritten")


def run(values: argparse.Namespace) -> None:
    """Generate the images and print their files."""
    from ..generation.generate import GenerateConfig, generate

    sampling = sampling_of(values, values.negative_prompt)
    auto = None if values.auto is None else Auto(values.auto, values.auto_mode)
    config = GenerateConfig(
        values.prompt, sampling, source_of(values), values.adapter, values.library, values.num, values.seed,
        values.batch, values.out, values.subjects_apart, auto,
        report=partial(print, file=sys.stderr),
    )  # fmt: skip
    for file in generate(config):
        print(file)
