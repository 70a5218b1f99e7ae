"""The command line of the measurement, and its report."""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ...io.files import write_atomic
from ...pipelines.base import EMBEDDED_WEIGHTS
from ...pipelines.precision import best_precision
from ...programs import program
from ...quiet import hide_known_warnings
from ...reports.sheets import contact_sheet
from ..comparing.lessons import base_hash
from .modes import MODES
from .pairs import KINDS, parse_pair
from .tables import Row, report

DEFAULT_PAIRS = (
    "cyclops-purple+tractor", "stripemug-red+android-pink", "parrot+castle", "gremlin-green+cyclops-purple",
)  # fmt: skip
ALL_MODES = ("truth", "alone", "base", *MODES)


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog="python -m nora_diffusion.tiny_sd.blending", description=main.__doc__)
    parser.add_argument("--pairs", nargs="+", type=parse_pair, default=[parse_pair(text) for text in DEFAULT_PAIRS],
                        metavar="LEFT+RIGHT", help=f"subjects (default: {' '.join(DEFAULT_PAIRS)})")  # fmt: skip
    parser.add_argument("--modes", nargs="+", choices=ALL_MODES, default=ALL_MODES, metavar="MODE",
                        help=f"of {', '.join(ALL_MODES)} (default: all)")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=4, help="images of each prompt (default: 4)")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default=best_precision(torch.device("cpu")),
                        help="precision of training and images (default here: %(default)s)")  # fmt: skip
    parser.add_argument("--weights", type=Path, default=EMBEDDED_WEIGHTS, help="folder of the base (default: shipped)")
    parser.add_argument("--out", type=Path, default=Path("outputs/blending"),
                        help="folder for adapters, report.md and pictures (default: %(default)s)")  # fmt: skip
    return parser


def _rows(args: argparse.Namespace) -> tuple[list[Row], float]:
    """Measure what is missing in ``rows.jsonl``; the rows of all modes and pairs, and the accuracy of the probe."""
    from .pairs import cached_reader
    from .studio import Studio, train_subjects_of

    base, seeds, file = base_hash(args.weights), range(args.seeds), args.out / "rows.jsonl"
    known = {row["key"]: row for row in map(json.loads, file.read_text().splitlines())} if file.is_file() else {}
    train_subjects_of([name for pair in args.pairs for name in pair], args.weights, args.out, args.mixed_precision)
    reader = cached_reader()
    studio = Studio(args.weights, args.out, reader, args.mixed_precision)
    rows = []
    for mode in args.modes:
        for pair in args.pairs:
            settings = f"{base} {mode} {pair} {seeds} {args.mixed_precision} each image"  # once the means were saved
            key = hashlib.sha256(settings.encode()).hexdigest()[:16]
            if key not in known:
                images, seconds = studio.draw(mode, pair, seeds)
                scores = studio.score(pair, images, seeds)
                known[key] = {"key": key, "mode": mode, "pair": "+".join(pair), "scores": scores, "seconds": seconds}
                write_atomic(file, "".join(json.dumps(row) + "\n" for row in known.values()))
                _save(images, _picture(args.out, mode, "+".join(pair)))
                means = {name: round(statistics.fmean(values), 3) for name, values in scores.items()}
                print(mode, "+".join(pair), means, flush=True)
            rows.append(known[key])
    return rows, reader.accuracy


def _picture(out: Path, mode: str, pair: str) -> Path:
    """The images of a mode and a pair: a row for each background, a column for each seed."""
    return out / "pictures" / f"{mode}-{pair}.png"


def _save(images: Sequence[Image.Image], file: Path) -> None:
    side, each = images[0].width, len(images) // len(KINDS)
    sheet = Image.new("RGB", (each * side, len(KINDS) * side))
    for number, image in enumerate(images):
        sheet.paste(image, (number % each * side, number // each * side))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, optimize=True)


def grid(out: Path, rows: Sequence[Row]) -> Image.Image:
    """The first image of two backgrounds of each pair, a row for each mode."""
    modes, pairs = (list(dict.fromkeys(row[key] for row in rows)) for key in ("mode", "pair"))
    cells = []
    for mode in modes:
        line = []
        for pair in pairs:
            label = pair.replace("+", " + ")
            with Image.open(_picture(out, mode, pair)) as sheet:
                side = sheet.height // len(KINDS)
                line += [(sheet.crop((0, top, side, top + side)), label) for top in (side, 2 * side)]
        cells.append(line)
    return contact_sheet(cells, modes, side=112)


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Train subjects one by one, draw two of them in one image in several modes, and measure how much they blend."""
    args = build_parser().parse_args(argv)
    hide_known_warnings()
    rows, accuracy = _rows(args)
    text = report(rows, accuracy)
    write_atomic(args.out / "report.md", text)
    grid(args.out, rows).save(args.out / "grid.webp", quality=90)
    print(f"\n{text}\nWrote {args.out / 'report.md'} and grid.webp. All images are in pictures/.")
    return 0
