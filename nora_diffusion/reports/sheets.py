"""Contact sheets: rows of labeled images in one image."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN = 8
LABEL_HEIGHT = 34
BACKGROUND, INK, FAINT = (255, 255, 255), (30, 30, 34), (110, 110, 118)


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """Resize to ``side`` x ``side`` pixels; small images are enlarged by nearest neighbor, to show their pixels."""
    small = max(image.size) * 2 <= side
    return image.convert("RGB").resize((side, side), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)


def contact_sheet(
    rows: Sequence[Sequence[tuple[Image.Image, str]]], titles: Sequence[str] = (), side: int = 128
) -> Image.Image:
    """Rows of ``(image, label)``, each row under its title; labels are wrapped to two lines."""
    columns = max(len(row) for row in rows)
    row_height = side + LABEL_HEIGHT + MARGIN
    title_height = 26 if any(titles) else 0
    size = (columns * (side + MARGIN) + MARGIN, len(rows) * (row_height + title_height) + MARGIN)
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        top = MARGIN + i * (row_height + title_height)
        if i < len(titles) and titles[i]:
            draw.text((MARGIN, top), titles[i], fill=INK, font=ImageFont.load_default(17))
        for j, (image, label) in enumerate(row):
            left = MARGIN + j * (side + MARGIN)
            sheet.paste(enlarge(image, side), (left, top + title_height))
            _label(draw, label, left, top + title_height + side + 2, side)
    return sheet


def _label(draw: ImageDraw.ImageDraw, text: str, left: int, top: int, width: int) -> None:
    font = ImageFont.load_default(12)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    for number, line in enumerate(lines[:2]):
        draw.text((left, top + 15 * number), line, fill=FAINT, font=font)
