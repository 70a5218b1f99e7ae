"""The events of a request: read from a stream of server-sent events, and checked."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ...errors import UserError
from ...generation.image_settings import ImageSettings, settings_from
from ...io.images import decode
from ...io.untrusted import parse_json
from .failures import message_of

MAX_EVENT = 128 * 2**20
"""Bytes of the largest event: a PNG of 4096 x 4096 pixels of noise in base64 has 64 MiB."""
MAX_VALUES = 10_000
MAX_STEPS = 10_000
MAX_PREVIEW = 2**20


@dataclass(frozen=True)
class Queued:
    """Picture ``index`` of the request waits, as number ``place`` of all pictures (1: the next one; 0: not told)."""

    index: int
    place: int


@dataclass(frozen=True)
class Step:
    """Step ``step`` of ``steps`` is done. ``preview``: a small picture of what it predicts, in some steps."""

    index: int
    step: int
    steps: int
    preview: Image.Image | None


@dataclass(frozen=True)
class Made:
    """A finished picture, with its settings."""

    index: int
    image: Image.Image
    settings: ImageSettings


@dataclass(frozen=True)
class Failed:
    """A picture that was not made, and why."""

    index: int
    status: int
    message: str


Event = Queued | Step | Made | Failed


class Lines:
    """Parts a stream into events of ``event: KIND`` and ``data: JSON``; other lines are ignored."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> Iterator[tuple[str, bytes]]:
        """The events that end in ``chunk``. Raises ``ValueError`` if one is too large."""
        start = max(0, len(self._rest) - 1)
        self._rest += chunk
        while (end := self._rest.find(b"\n\n", start)) >= 0:
            block, start = bytes(self._rest[:end]), 0
            del self._rest[: end + 2]
            found = dict(line.split(b": ", 1) for line in block.split(b"\n") if b": " in line)
            if b"event" in found:
                yield found[b"event"].decode("ascii", "replace"), found.get(b"data", b"")
        if len(self._rest) > MAX_EVENT:
            raise ValueError("an event is too large")


def event_from(kind: str, data: bytes, count: int) -> Event | None:
    """An event of a request for ``count`` pictures; ``None`` for a kind that is not known. Raises ``ValueError``."""
    read = READERS.get(kind)
    if read is None:
        return None
    values = parse_json(data, MAX_VALUES)
    if not isinstance(values, dict):
        raise ValueError("an event is not an object")
    return read(values, _whole(values, "index", count - 1))


def _queued(values: dict[str, Any], index: int) -> Event:
    return Queued(index, _whole(values, "place", 2**31, 0))


def _step(values: dict[str, Any], index: int) -> Event:
    text = values.get("preview")
    preview = _image(text, MAX_PREVIEW, ("JPEG", "PNG", "WEBP")) if text else None
    return Step(index, _whole(values, "step", MAX_STEPS), _whole(values, "steps", MAX_STEPS), preview)


def _made(values: dict[str, Any], index: int) -> Event:
    return Made(index, _image(values.get("b64"), MAX_EVENT, ("PNG",)), settings_from(values.get("settings")))


def _failed(values: dict[str, Any], index: int) -> Event:
    return Failed(index, _whole(values, "status", 599), message_of(values) or "the server gives no reason")


READERS: dict[str, Callable[[dict[str, Any], int], Event]] = {
    "queued": _queued, "step": _step, "picture": _made, "error": _failed,
}  # fmt: skip


def _whole(values: dict[str, Any], name: str, most: int, default: int | None = None) -> int:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{name} is {str(value)[:40]!r}")
    return value


def _image(text: Any, most: int, formats: tuple[str, ...]) -> Image.Image:
    if not isinstance(text, str) or len(text) > most:
        raise ValueError("a picture is no text, or too large")
    try:
        return decode(base64.b64decode(text, validate=True), formats)
    except (binascii.Error, UserError) as error:
        raise ValueError(f"a picture is damaged: {error}") from None
