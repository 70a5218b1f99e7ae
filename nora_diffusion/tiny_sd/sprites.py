"""``python -m nora_diffusion.tiny_sd.sprites``: build the sprite sheet from a font file."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..programs import program, run_program
from .world.sprites import FOLDER, build_sheet


@program
def main() -> int:
    """Build the sprite sheet from a font file and print its path."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--font", type=Path, required=True, help="path of NotoColorEmoji.ttf")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to (default: the package's own)")
    args = parser.parse_args()
    print(build_sheet(args.font, args.out))
    return 0


if __name__ == "__main__":
    run_program(main)
