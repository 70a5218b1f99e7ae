"""Images to bytes and back."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, PngImagePlugin

MAX_PIXELS = 40_000_000


def png(image: Image.Image, info: PngImagePlugin.PngInfo | None = None) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def load_image(path: Path) -> Image.Image:
    """The picture of a file that this toolkit wrote, in RGB."""
    with Image.open(path) as image:
        return image.convert("RGB")
