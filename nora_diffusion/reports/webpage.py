"""Self-contained HTML reports, without scripts or network access. All text is escaped."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Literal

from PIL import Image

from .sheets import enlarge

STYLE = """
:root { color-scheme: light dark; --color-accent: #7c3aed; --ink: #1c1c22; --faint: #62626d; --line: #dcdce3;
  --paper: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --color-accent: #a78bfa; --ink: #ececf1; --faint: #a3a3b0;
  --line: #3a3a44; --paper: #17171c; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; } caption { text-align: left; color: var(--faint); padding-bottom: .4rem; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.chosen { font-weight: 600; }
a { color: var(--color-accent); } small { color: var(--faint); } .row { display: flex; gap: 2px; }
img { display: block; max-width: none; image-rendering: auto; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; }
.plot { margin: 0; } .plot svg { width: 100%; height: auto; } .plot text { fill: var(--faint); font-size: 12px; }
.wide { grid-column: 1 / -1; } .plot .name { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
.plot .rule { stroke: var(--line); } figcaption { font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; color: var(--faint); font-size: .9rem; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em; }
section { margin-top: 1.5rem; } section > .legend { margin-bottom: .5rem; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole document; each of ``parts`` is HTML."""
    name = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style></head><body><h1>{name}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def heading(text: str) -> str:
    """A section title."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def links(targets: Mapping[str, str]) -> str:
    """A list of links by their texts; targets are relative addresses."""
    items = [f'<a href="{html.escape(target)}">{html.escape(text)}</a>' for text, target in targets.items()]
    return f"<p>{', '.join(items)}</p>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", chosen: int | None = None) -> str:
    """A table with cells of plain text or images (:class:`ImageTag`).

    The first column is the header; the row ``chosen`` is bold.
    """
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    marks = [' class="chosen"' if number == chosen else "" for number in range(len(rows))]
    body = "".join(
        f"<tr{mark}>"
        + f'<th scope="row">{html.escape(row[0])}</th>'
        + "".join(_cell(cell) for cell in row[1:])
        + "</tr>"
        for row, mark in zip(rows, marks, strict=True)
    )
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: str) -> str:
    if isinstance(cell, ImageTag):
        return f"<td>{cell}</td>"
    return f"<td{' class=number' if cell[:1].isdigit() or cell[:1] in '-–+' else ''}>{html.escape(cell)}</td>"


class ImageTag(str):
    """The HTML of an image, which is not escaped again."""


def image_tag(image: Image.Image, alt: str, side: int = 128) -> ImageTag:
    """An ``img`` element of ``side`` pixels with the data in it: a PNG if the image is that small, else a JPEG."""
    small = max(image.size) <= side
    source = data_uri(image.convert("RGB"), "PNG") if small else data_uri(enlarge(image, side), "JPEG")
    return ImageTag(f'<img width="{side}" height="{side}" alt="{html.escape(alt)}" src="{source}">')


def images_tag(images: Sequence[Image.Image], alt: str, caption: str, side: int = 96) -> ImageTag:
    """Images side by side in one cell of a table, with a line of text below."""
    tags = "".join(image_tag(image, alt, side) for image in images)
    return ImageTag(f'<div class="row">{tags}</div><small>{html.escape(caption)}</small>')


def data_uri(image: Image.Image, format: Literal["PNG", "JPEG", "WEBP"], **options: int) -> str:
    """The image as a ``data:`` URI; ``options`` are those of Pillow's writer of that format."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
