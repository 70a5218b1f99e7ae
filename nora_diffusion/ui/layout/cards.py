"""Adapters as HTML: everything that comes from a file is escaped."""

from __future__ import annotations

import functools
import io
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from ...errors import UserError
from ...io.images import MAX_PIXELS
from ...reports.webpage import data_uri
from ..entries import Entry
from ..messages import short_name

THUMBNAIL_SIDE = 192
EMPTY = (
    '<div class="empty"><b>The library is empty.</b><br>Teach it a subject in the Train tab: an example subject takes '
    "one click. Or drop a <code>.safetensors</code> file into the field for imports.</div>"
)
NOTHING = '<div class="empty">No adapter matches. Search for fewer words, or show all methods.</div>'


def cards(entries: Sequence[Entry], misfits: Sequence[str | None], chosen: str = "") -> str:
    """A grid of buttons, one for each adapter; those that cannot be used here say why."""
    cells = "".join(_card(e, why, e.name == chosen) for e, why in zip(entries, misfits, strict=True))
    return f'<div class="cards">{cells}</div>'


def _card(entry: Entry, misfit: str | None, pressed: bool) -> str:
    lines = [f"<b>{escape(entry.name)}</b>"]
    if entry.info is not None:
        info = entry.info
        lines += [f"<small>{escape(info.trigger)}</small>"] if info.trigger else []
        lines.append(f"<small>{escape(method(entry))} · {short_number(info.trained_parameters)} numbers</small>")
    lines += [f"<small>{escape(said)}</small>"] if (said := score_line(entry)) else []
    if misfit:
        lines.append(f'<small class="why">{escape(misfit)}</small>')
    return (
        f'<button type="button" class="card{" off" if misfit else ""}" data-name="{escape(entry.name)}" '
        f'aria-pressed="{str(pressed).lower()}">{_picture(entry)}{"".join(lines)}</button>'
    )


def _picture(entry: Entry) -> str:
    try:
        found = entry.thumbnail()
        modified = found.stat().st_mtime_ns if isinstance(found, Path) else entry.stamp[1]
        source = thumbnail(found, modified) if found else ""
    except (OSError, UserError):
        source = ""
    if not source:
        return f'<span class="none" aria-hidden="true">{escape(entry.name[:1].upper())}</span>'
    return f'<img alt="" loading="lazy" src="{source}">'


@functools.lru_cache(2048)
def thumbnail(source: Path | bytes, modified: int) -> str:
    """A small copy of a picture as a data URI, kept as long as the file is the same."""
    image = read_preview(source if isinstance(source, bytes) else source.read_bytes())
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return data_uri(image, "WEBP", quality=80)


def read_preview(content: bytes) -> Image.Image:
    """A picture that anybody may have made, refused by its header before it is decoded."""
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise UserError("the picture has too many pixels")
            return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError("the picture cannot be read") from error


def score_line(entry: Entry) -> str:
    """The scores of its training's last samples, for a card."""
    return " · ".join(f"{name.removesuffix(' fidelity')} {value:.2f}" for name, value in entry.scores().items())


def method(entry: Entry) -> str:
    """Method and ranks, for example ``nora r = 32, r' = 4``."""
    if entry.info is None:
        return "unreadable"
    name = entry.info.method if entry.info.kind == "nora" else entry.info.kind
    return f"{name} {entry.info.ranks}"


def short_number(count: int) -> str:
    """``116,736`` as ``117 k``."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def facts(entry: Entry, misfit: str | None) -> str:
    """Everything that is known of one adapter, as a table."""
    rows = {
        "name": entry.name,
        "file": f"{entry.name}/{entry.file.name}" if entry.in_own_folder else entry.file.name,
    }
    if misfit:
        rows["cannot be used"] = misfit
    if entry.info is not None:
        info = entry.info
        rows |= {
            "trigger": info.trigger or "none",
            "prompt": info.instance_prompt,
            "class word": info.class_word,
            "method": method(entry),
            "parts": ", ".join(info.components),
            "base": short_name(info.base) if info.base else "unknown",
            "trained numbers": f"{info.trained_parameters:,} of {info.stored_parameters:,} stored",
            "scores": ", ".join(f"{name} {value:.3f}" for name, value in entry.scores().items()),
            "steps": str(info.step) if info.step else "",
            "seed": "" if info.seed is None else str(info.seed),
            "license": info.license,
        }
    rows |= {
        "size": f"{entry.size:,} bytes",
        "written": time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.modified)),
        "SHA-256": entry.sha256 or "not computed yet",
    }
    return table((name, value) for name, value in rows.items() if value)


def line(text: str, bad: bool = False) -> str:
    """One line of status."""
    return f'<p class="status{" bad" if bad else ""}" role="status">{escape(text)}</p>'


def table(rows: object) -> str:
    """Rows of ``(name, value)`` as a table with row headings."""
    cells = "".join(f'<tr><th scope="row">{escape(str(n))}</th><td>{escape(str(v))}</td></tr>' for n, v in rows)  # type: ignore[attr-defined]
    return f'<table class="facts"><tbody>{cells}</tbody></table>'
