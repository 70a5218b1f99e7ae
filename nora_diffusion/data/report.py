"""The report of a run's training data: every training image, every rejected file with the reason, duplicates."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..io.files import write_atomic
from ..reports.webpage import ImageTag, data_uri, heading, page, paragraph, table
from .folder import Reject
from .images import SourceImage
from .similarity import Duplicate
from .transforms import View

HTML_NAME, JSON_NAME = "data_report.html", "data_report.json"
FORMAT_VERSION = 1
THUMB_SIDE = 128


@dataclass(frozen=True)
class Row:
    """One source image with its caption and its training images (``views``)."""

    source: SourceImage
    caption: str
    views: Sequence[View]

    @property
    def enlargement(self) -> float:
        """The scale factor of its crops; at most 1 if the image is large enough."""
        view = self.views[0]
        return view.shape[0] / (view.box[2] - view.box[0])

    def all_remarks(self) -> list[str]:
        """What was changed, enlargement first."""
        factor = self.enlargement
        enlarged = [f"too small, so enlarged {factor:.1f} times"] if factor > 1.05 else []
        mask = self.source.mask
        coverage = [] if mask is None else [f"its mask covers {mask.coverage:.0%}"]
        return [*enlarged, *self.source.remarks, *coverage]


@dataclass(frozen=True)
class DataReport:
    """The training data of a run: images, rejected files, duplicates, held-out images, sentences about problems."""

    rows: Sequence[Row]
    rejects: Sequence[Reject] = ()
    duplicates: Sequence[Duplicate] = ()
    held_out: Sequence[SourceImage] = ()
    findings: Sequence[str] = ()
    left_out: Sequence[Reject] = ()

    def write(self, folder: Path) -> Path:
        """Write ``data_report.json`` and the self-contained ``data_report.html``; returns the path of the page.

        Raises :class:`UserError` if the folder cannot be written.
        """
        write_atomic(folder / JSON_NAME, json.dumps(self._as_json(), indent=1, ensure_ascii=False))
        return write_atomic(folder / HTML_NAME, self._as_html())

    def _as_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "photos": [_row_json(row) for row in self.rows],
            "held_out": [image.path.name for image in self.held_out],
            "rejects": [{"file": reject.path.name, "reason": reject.reason} for reject in self.rejects],
            "left_out": [{"file": reject.path.name, "reason": reject.reason} for reject in self.left_out],
            "duplicates": [
                {"files": [d.first.path.name, d.second.path.name], "bits": d.distance, "same_file": d.same_file}
                for d in self.duplicates
            ],
            "findings": list(self.findings),
        }

    def _as_html(self) -> str:
        views = sum(len(row.views) for row in self.rows)
        parts = [
            paragraph(f"{len(self.rows)} photos used, {views} training images, {len(self.rejects)} files rejected.")
        ]
        if self.held_out:
            names = ", ".join(image.path.name for image in self.held_out)
            parts.append(paragraph(f"Held out for validation, not trained on: {names}."))
        if self.findings:
            parts += [heading("Problems"), *map(paragraph, self.findings)]
        if self.rejects:
            parts += [heading("Rejected"), table(("file", "reason"), [(r.path.name, r.reason) for r in self.rejects])]
        if self.left_out:
            parts += [heading("Left out"), table(("file", "reason"), [(r.path.name, r.reason) for r in self.left_out])]
        if self.duplicates:
            pairs = [
                (d.first.path.name, d.second.path.name, "same file" if d.same_file else "looks the same")
                for d in self.duplicates
            ]
            note = "A duplicate photo counts twice in training: remove one of each pair."
            parts += [heading("Duplicates"), paragraph(note), table(("photo", "duplicate", ""), pairs)]
        parts.append(heading("Photos as they are trained on"))
        header = ("file", "size", "training images", "caption", "remarks")
        parts.append(table(header, [_cells(row) for row in self.rows]))
        return page("Training data", parts)


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "file": row.source.path.name,
        "size": list(row.source.size),
        "sha256": row.source.sha256,
        "dhash": f"{row.source.fingerprint.dhash:016x}",
        "caption": row.caption,
        "shape": list(row.views[0].shape),
        "views": [{"box": [round(x, 3) for x in view.box], "mirrored": view.mirrored} for view in row.views],
        "enlarged": round(row.enlargement, 3),
        "mask": row.source.mask is not None,
        "remarks": row.all_remarks(),
    }


def _cells(row: Row) -> tuple[str, ...]:
    image, name = row.source.image, row.source.path.name
    thumbnails = "".join(thumbnail(view.apply(image), name) for view in row.views)
    cell = ImageTag(f'<div style="display:flex;flex-wrap:wrap;gap:.3rem">{thumbnails}</div>')
    return name, "{} × {}".format(*image.size), cell, row.caption, "; ".join(row.all_remarks())


def thumbnail(image: Image.Image, alt: str) -> str:
    """An ``img`` element with the image data in it, in the image's aspect ratio."""
    small = image.copy()
    small.thumbnail((THUMB_SIDE, THUMB_SIDE))
    width, height = (round(side * THUMB_SIDE / max(image.size)) for side in image.size)
    source = data_uri(small, "JPEG", quality=85)
    return f'<img width="{width}" height="{height}" alt="{html.escape(alt)}" src="{source}">'
