"""PNG bytes from images, images from files."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, PngImagePlugin

from ..errors import UserError

MAX_PIXELS = 40_000_000
"""Larger images are refused wherever they are read."""


def png(image: Image.Image, info: PngImagePlugin.PngInfo | None = None) -> bytes:
    """Encode an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def load_image(path: Path) -> Image.Image:
    """Read an image that this toolkit wrote, as RGB."""
    with Image.open(path) as image:
        return image.convert("RGB")


def decode(content: bytes, formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP")) -> Image.Image:
    """Decode an untrusted image as RGB. Its size is checked from the header first. Raises :class:`UserError`."""
    try:
        with Image.open(io.BytesIO(content), formats=formats) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise UserError("the image has too many pixels")
            return opened.convert("RGB")
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError("the image cannot be read") from error
