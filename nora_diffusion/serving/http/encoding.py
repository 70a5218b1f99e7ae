"""Pictures as files with their settings: PNG has them as text, WebP and JPEG in EXIF's UserComment, as in A1111."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from typing import Any, Literal

from PIL import Image

from ...generation.image_settings import ImageSettings, png_with_settings
from ..tickets import Picture

Format = Literal["png", "webp", "jpeg"]
USER_COMMENT, EXIF_IFD = 0x9286, 0x8769
QUALITY = 95


def encoded(image: Any, settings: ImageSettings, form: Format) -> bytes:
    """The bytes of a picture's file."""
    if form == "png":
        return png_with_settings(image, settings)
    exif = Image.Exif()
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + settings.parameters_text().encode("utf-16-be")
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, form.upper(), exif=exif, quality=QUALITY)
    return buffer.getvalue()


def as_base64(picture: Picture, base: str, form: Format = "png") -> tuple[str, ImageSettings]:
    """A picture's file in base64, and its settings. ``base``: its name for clients, without this machine's folders."""
    settings = replace(picture.settings, base=base)
    return base64.b64encode(encoded(picture.image, settings, form)).decode(), settings
