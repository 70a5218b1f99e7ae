"""``nora-diffusion generate``."""

from __future__ import annotations

import argparse

from .opening import add_opening_arguments

HELP = "generate pictures with any base and adapters"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    parser.add_argument(
        "--prompt", action="append", default=[], help="what to show, with tags like <lora:dog:0.8>; may be repeated"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="PATH[:WEIGHT]",
        help="file, folder, hub id or PACK#NAME; its weight is 1 unless given; may be repeated",
    )
    parser.add_argument("--library", metavar="DIR", help="folder of adapters that tags in prompts may name")
    parser.add_argument("--base", help="pipeline folder or hub id; without it the embedded base")
    parser.add_argument("--negative_prompt", default="", help="what to avoid")
    parser.add_argument("--num", type=int, default=1, help="pictures of each prompt, 1 to 10000")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture; the next ones count up")
    parser.add_argument("--steps", type=int, help="denoising steps, 1 to 1000 (default: what suits the base)")
    parser.add_argument("--guidance", type=float, help="guidance scale, 0 to 100 (default: what suits the base)")
    parser.add_argument("--width", type=int, help="width in pixels, a multiple of 8 (default: the base's own)")
    parser.add_argument("--height", type=int, help="height in pixels, a multiple of 8 (default: the base's own)")
    parser.add_argument("--batch", type=int, default=4, help="pictures at a time; fewer take less memory")
    parser.add_argument("--device", help="cpu, cuda, mps ... (default: the best there is)")
    add_opening_arguments(parser)
    parser.add_argument("--out", default="outputs", help="folder for the pictures; nothing in it is overwritten")


def run(values: argparse.Namespace) -> None:
    """Generate and print the files."""
    from ..generation.generate import GenerateConfig, generate

    settings = {k: v for k, v in vars(values).items() if k not in ("command", "run", "prompt", "adapter")}
    for file in generate(GenerateConfig(prompts=values.prompt, adapters=values.adapter, **settings)):
        print(file)
