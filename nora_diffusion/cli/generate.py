"""``nora-diffusion generate``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ..errors import UserError
from ..generation.retrieval.settings import Auto, AutoMode
from .flags import add_sampling_flags, add_source_flags, sampling_of, source_of

if TYPE_CHECKING:
    from ..generation.start_image import StartImage

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
    _add_image_flags(parser)
    add_source_flags(parser)
    parser.add_argument("--out", default="outputs", help="folder for the images; nothing in it is overwritten")


def _add_image_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--init_image", type=Path, metavar="FILE", help="start from this image in place of noise")
    parser.add_argument("--strength", type=float, help="how much of it changes, up to 1 (default: 0.6)")
    parser.add_argument(
        "--mask", type=Path, metavar="FILE", help="change --init_image only where this image of the same shape is white"
    )
    parser.add_argument(
        "--mask_padding",
        type=int,
        metavar="PIXELS",
        help="generate only the box around the white part of --mask, with so many pixels around it, at the base's size",
    )
    parser.add_argument(
        "--hires_scale", type=float, default=1.0, help="size of a second pass, as a multiple (default: 1, none)"
    )
    parser.add_argument(
        "--hires_strength", type=float, default=0.5, help="how much the second pass changes (default: 0.5)"
    )


def _start_of(values: argparse.Namespace) -> StartImage | None:
    from ..generation.start_image import StartImage

    of_image = {"strength": values.strength, "mask": values.mask, "padding": values.mask_padding}
    given = {name: value for name, value in of_image.items() if value is not None}
    if values.init_image is None:
        if given:
            raise UserError(f"{', '.join(given)}: there is no image that it applies to: give --init_image")
        return None
    return StartImage(values.init_image, **given)


def run(values: argparse.Namespace) -> None:
    """Generate the images and print their files."""
    from ..generation.generate import GenerateConfig, generate

    sampling = replace(
        sampling_of(values, values.negative_prompt),
        hires_scale=values.hires_scale,
        hires_strength=values.hires_strength,
    )
    auto = None if values.auto is None else Auto(values.auto, values.auto_mode)
    config = GenerateConfig(
        values.prompt, sampling, source_of(values), values.adapter, values.library, values.num, values.seed,
        values.batch, values.out, values.subjects_apart, auto, _start_of(values),
        report=partial(print, file=sys.stderr),
    )  # fmt: skip
    for file in generate(config):
        print(file)
