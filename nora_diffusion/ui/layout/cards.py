"""Adapters as HTML. Every text is escaped."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from ...errors import UserError
from ...io.images import decode
from ...reports.webpage import data_uri
from ..entries import Entry
from ..messages import short_name

THUMBNAIL_SIDE = 192
EMPTY = (
    '<div class="empty"><b>The library is empty.</b><br>Train a subject in the Train tab (example subjects are '
    "included), or import a <code>.safetensors</code> file here.</div>"
)
NO_MATCH = '<div class="empty">No adapter matches. Search for fewer words, or show all methods.</div>'


def cards(entries: Sequence[Entry], problems: Sequence[str | None], chosen: str = "") -> str:
    """A grid of buttons, one per adapter. ``problems`` say why adapters cannot be used with this base."""
    cells = "".join(_card(e, problem, e.name == chosen) for e, problem in zip(entries, problems, strict=True))
    return f'<div class="cards">{cells}</div>'


def _card(entry: Entry, problem: str | None, pressed: bool) -> str:
    lines = [f"<b>{escape(entry.name)}</b>"]
    if entry.info is not None:
        info = entry.info
        lines += [f"<small>{escape(info.trigger)}</small>"] if info.trigger else []
        lines.append(f"<small>{escape(method(entry))} · {short_number(info.trained_parameters)} parameters</small>")
    lines += [f"<small>{escape(scores)}</small>"] if (scores := score_line(entry)) else []
    if problem:
        lines.append(f'<small class="why">{escape(problem)}</small>')
    return (
        f'<button type="button" class="card{" off" if problem else ""}" data-name="{escape(entry.name)}" '
        f'aria-pressed="{str(pressed).lower()}">{_image(entry)}{"".join(lines)}</button>'
    )


def _image(entry: Entry) -> str:
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
    """A small copy of an image as a data URI, cached until the file changes."""
    image = decode(source if isinstance(source, bytes) else source.read_bytes())
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return data_uri(image, "WEBP", quality=80)


def score_line(entry: Entry) -> str:
    """Scores of the training's last samples, short enough for a card."""
    return " · ".join(f"{name.removesuffix(' fidelity')} {value:.2f}" for name, value in entry.scores().items())


def method(entry: Entry) -> str:
    """Method and ranks, for example ``nora r = 32, r' = 4``."""
    if entry.info is None:
        return "unreadable"
    name = entry.info.method if entry.info.is_ours else entry.info.kind
    return f"{name} {entry.info.ranks}"


def short_number(count: int) -> str:
    """Format ``116736`` as ``117k``."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def details(entry: Entry, problem: str | None) -> str:
    """A table of everything known about an adapter."""
    rows = {
        "name": entry.name,
        "file": f"{entry.name}/{entry.file.name}" if entry.in_own_folder else entry.file.name,
    }
    if problem:
        rows["cannot be used"] = problem
    if entry.info is not None:
        info = entry.info
        rows |= {
            "trigger word": info.trigger or "none",
            "instance prompt": info.instance_prompt,
            "class word": info.class_word,
            "method": method(entry),
            "components": ", ".join(info.components),
            "base": short_name(info.base) if info.base else "unknown",
            "parameters": f"{info.trained_parameters:,} trained"
            + (f", {info.stored_parameters:,} stored" if info.stored_parameters else ""),
            "scores": ", ".join(f"{name} {value:.3f}" for name, value in entry.scores().items()),
            "steps": str(info.step) if info.step else "",
            "seed": "" if info.seed is None else str(info.seed),
            "license": info.license,
        }
    rows |= {
        "size": f"{entry.size:,} bytes",
        "modified": time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.modified)),
        "SHA-256": entry.sha256 or "not computed yet",
    }
    return table((name, value) for name, value in rows.items() if value and name not in entry.untold)


def suggestions(found: Sequence[tuple[str, float]]) -> str:
    """Adapters with their scores as buttons; empty if there is none."""
    buttons = "".join(
        f'<button type="button" class="chip" data-name="{escape(name)}" title="Add {escape(name)} to the prompt">'
        f"{escape(name)} <small>{score:.2f}</small></button>"
        for name, score in found
    )
    return f'<div class="suggestions"><span>Suggested for this prompt:</span>{buttons}</div>' if found else ""


def line(text: str, bad: bool = False) -> str:
    """A status line."""
    return f'<p class="status{" bad" if bad else ""}" role="status">{escape(text)}</p>'


def table(rows: Iterable[tuple[str, object]]) -> str:
    """A table of ``(name, value)`` rows with row headings."""
    cells = "".join(f'<tr><th scope="row">{escape(str(n))}</th><td>{escape(str(v))}</td></tr>' for n, v in rows)
    return f'<table class="facts"><tbody>{cells}</tbody></table>'
