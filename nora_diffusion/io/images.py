"""PNG bytes from images, images from files."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, PngImagePlugin

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
