"""The sprite sheet: cut-outs of Noto Color Emoji (SIL OFL 1.1) packed in one PNG with a JSON index.

``python -m nora_diffusion.tiny_sd.sprites --font NotoColorEmoji.ttf`` builds it; rendering needs no font.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .vocabulary import EMOJI, PROPS

CELL = 96  # side of a cell; the longer side of every cut-out
FOLDER = Path(__file__).parents[1] / "sprites"
_COLUMNS = 12
_FONT_SIZE = 109  # the only bitmap size in the font


def _cut_out(char: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One glyph on a transparent background, cropped to its alpha box and fitted into a cell."""
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((8, 8), char, font=font, embedded_color=True)
    box = canvas.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox()
    if box is None:
        raise ValueError(f"the font has no glyph for {char!r}: use NotoColorEmoji.ttf")
    glyph = canvas.crop(box)
    scale = CELL / max(glyph.size)
    size = (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale)))
    return glyph.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def build_sheet(font_path: Path, folder: Path = FOLDER) -> Path:
    """Write ``sheet.png`` with every cut-out and ``index.json`` (name -> box); return the sheet's path."""
    font = ImageFont.truetype(str(font_path), _FONT_SIZE)
    entries = [(e.name, e.char) for e in EMOJI] + list(PROPS)
    rows = -(-len(entries) // _COLUMNS)
    sheet = Image.new("RGBA", (_COLUMNS * CELL, rows * CELL))
    index: dict[str, list[int]] = {}
    for i, (name, char) in enumerate(entries):
        x, y = (i % _COLUMNS) * CELL, (i // _COLUMNS) * CELL
        glyph = _cut_out(char, font)
        sheet.paste(glyph, (x, y))
        index[name] = [x, y, x + glyph.width, y + glyph.height]
    folder.mkdir(parents=True, exist_ok=True)
    sheet.save(folder / "sheet.png", optimize=True)
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    return folder / "sheet.png"


@cache
def _sheet() -> tuple[Image.Image, dict[str, list[int]]]:
    index = json.loads((FOLDER / "index.json").read_text())
    return Image.open(FOLDER / "sheet.png").convert("RGBA"), index


@cache
def sprite(name: str) -> Image.Image:
    """The RGBA cut-out of that name (longer side ``CELL``). Raises KeyError for an unknown name."""
    sheet, index = _sheet()
    x0, y0, x1, y1 = index[name]
    return sheet.crop((x0, y0, x1, y1))
