"""What a run learns from, to look at before it has learned it: every training picture, every reject and why."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..io.files import write_atomic
from ..reports.webpage import ImageTag, data_uri, heading, page, paragraph, table
from .images import Reject, SourceImage
from .similarity import Duplicate, dhash
from .transforms import View

HTML_NAME, JSON_NAME = "data_report.html", "data_report.json"
FORMAT_VERSION = 1
THUMB_SIDE = 128


@dataclass(frozen=True)
class Row:
    """One photo of a run: what of it is learned, in whose words, and what should be known about it."""

    photo: SourceImage
    caption: str
    views: Sequence[View]

    @property
    def enlargement(self) -> float:
        """By how much its crop is enlarged; at most 1 where it is large enough."""
        view = self.views[0]
        return view.shape[0] / (view.box[2] - view.box[0])

    def all_remarks(self) -> list[str]:
        """What was done to the photo, too small a size first."""
        factor = self.enlargement
        small = [f"too small, so enlarged {factor:.1f} times"] if factor > 1.05 else []
        mask = self.photo.mask
        share = [] if mask is None else [f"its mask covers {np.asarray(mask).mean() / 255:.0%}"]
        return [*small, *self.photo.remarks, *share]


def write_report(
    folder: Path,
    rows: Sequence[Row],
    rejects: Sequence[Reject],
    twins: Sequence[Duplicate],
    held_out: Sequence[SourceImage] = (),
) -> Path:
    """Write ``data_report.json`` and ``data_report.html`` (which holds its thumbnails); returns the page's path.

    Raises :class:`UserError` where the folder cannot be written.
    """
    document = as_json(rows, rejects, twins, held_out)
    write_atomic(folder / JSON_NAME, json.dumps(document, indent=1, ensure_ascii=False))
    return write_atomic(folder / HTML_NAME, as_html(rows, rejects, twins, held_out))


def as_json(
    rows: Sequence[Row], rejects: Sequence[Reject], twins: Sequence[Duplicate], held_out: Sequence[SourceImage] = ()
) -> dict[str, Any]:
    """The report for programs."""
    return {
        "format_version": FORMAT_VERSION,
        "photos": [_photo_json(row) for row in rows],
        "held_out": [photo.path.name for photo in held_out],
        "rejects": [{"file": reject.path.name, "reason": reject.reason} for reject in rejects],
        "duplicates": [
            {"files": [t.first.path.name, t.second.path.name], "bits": t.distance, "same_file": t.same_file}
            for t in twins
        ],
    }


def _photo_json(row: Row) -> dict[str, Any]:
    return {
        "file": row.photo.path.name,
        "size": list(row.photo.image.size),
        "sha256": row.photo.sha256,
        "dhash": f"{dhash(row.photo.image):016x}",
        "caption": row.caption,
        "shape": list(row.views[0].shape),
        "views": [{"box": [round(x, 3) for x in view.box], "mirrored": view.mirrored} for view in row.views],
        "enlarged": round(row.enlargement, 3),
        "mask": row.photo.mask is not None,
        "remarks": row.all_remarks(),
    }


def as_html(
    rows: Sequence[Row], rejects: Sequence[Reject], twins: Sequence[Duplicate], held_out: Sequence[SourceImage] = ()
) -> str:
    """The report for people: one page without script or network."""
    count = sum(len(row.views) for row in rows)
    parts = [paragraph(f"{len(rows)} photos in use, {count} training pictures, {len(rejects)} files left out.")]
    if held_out:
        names = ", ".join(photo.path.name for photo in held_out)
        parts.append(paragraph(f"Held out to measure with, and not learned from: {names}."))
    if rejects:
        parts += [heading("Left out"), table(("file", "why"), [(r.path.name, r.reason) for r in rejects])]
    if twins:
        pairs = [
            (t.first.path.name, t.second.path.name, "same file" if t.same_file else "looks the same") for t in twins
        ]
        note = "A photo that is there twice counts twice: take one of each pair out."
        parts += [heading("Duplicates"), paragraph(note), table(("photo", "its twin", ""), pairs)]
    parts.append(heading("Photos as they are learned"))
    parts.append(table(("file", "size", "training pictures", "caption", "remarks"), [_cells(row) for row in rows]))
    return page("Training data", parts)


def _cells(row: Row) -> tuple[str, ...]:
    size = "{} × {}".format(*row.photo.image.size)
    pictures = "".join(thumbnail(view.apply(row.photo.image), row.photo.path.name) for view in row.views)
    shown = ImageTag(f'<div style="display:flex;flex-wrap:wrap;gap:.3rem">{pictures}</div>')
    return row.photo.path.name, size, shown, row.caption, "; ".join(row.all_remarks())


def thumbnail(image: Image.Image, alt: str) -> str:
    """An ``img`` element with the picture in it, its aspect ratio kept."""
    small = image.copy()
    small.thumbnail((THUMB_SIDE, THUMB_SIDE))
    width, height = (round(side * THUMB_SIDE / max(image.size)) for side in image.size)
    source = data_uri(small, "JPEG", quality=85)
    return f'<img width="{width}" height="{height}" alt="{html.escape(alt)}" src="{source}">'
