"""Convert images to 8-bit sRGB: 16-bit gray, CMYK, palettes, color profiles, transparency."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageColor

from ..errors import UserError

WHITE = (255, 255, 255)
Color = tuple[int, int, int]


def color(name: str) -> Color:
    """Red, green and blue of a CSS name or ``#rrggbb``. Raises :class:`UserError`."""
    try:
        return ImageColor.getrgb(name.strip())[:3]
    except ValueError as error:
        raise UserError(f"background={name!r} is not a color: give a name such as white or gray, or #rrggbb") from error


def to_rgb(image: Image.Image, background: Color = WHITE) -> tuple[Image.Image, Image.Image | None, bool]:
    """The image in 8-bit sRGB on ``background``, and its alpha channel (mode ``L``), ``None`` if it is opaque.

    The last value is false if the color profile is broken; then the colors are taken as sRGB.
    """
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(image)).convert("RGB"), None, True
    if not image.has_transparency_data:
        rgb, profile_ok = _srgb(image)
        return rgb, None, profile_ok
    layers = image.convert("RGBA")
    alpha = layers.getchannel("A")
    rgb = layers.convert("RGB")  # drops the alpha channel, keeps the colors
    rgb.info["icc_profile"] = image.info.get("icc_profile")
    rgb, profile_ok = _srgb(rgb)
    if np.asarray(alpha).min(initial=255) == 255:
        return rgb, None, profile_ok
    return Image.composite(rgb, Image.new("RGB", rgb.size, background), alpha), alpha, profile_ok


def _eight_bits(image: Image.Image) -> np.ndarray[Any, Any]:
    """Scale 16-bit gray PNGs, the only readable format with these modes, from 0..65535 to 0..255."""
    return np.clip(np.round(np.asarray(image).astype(np.float64) / 257.0), 0, 255).astype(np.uint8)


def _srgb(image: Image.Image) -> tuple[Image.Image, bool]:
    profile = image.info.get("icc_profile")
    image = image.convert("RGB") if image.mode in ("P", "1") else image
    if profile and image.mode in ("RGB", "CMYK", "L"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            converted = None  # a broken profile is ignored
        return converted or image.convert("RGB"), converted is not None
    return image.convert("RGB"), True
