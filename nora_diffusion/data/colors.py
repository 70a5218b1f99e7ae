"""Any picture as 8-bit sRGB: 16-bit greys, CMYK, palettes, color profiles, transparency."""

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
        raise UserError(f"background={name!r} is no color: give a name such as white or grey, or #rrggbb") from error


def to_rgb(image: Image.Image, background: Color = WHITE) -> tuple[Image.Image, Image.Image | None, bool]:
    """8-bit sRGB on ``background``, and the alpha channel ``L`` where something is transparent, else ``None``.

    The last value is false where the picture's color profile is broken, so that its colors are taken as sRGB.
    """
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(image)).convert("RGB"), None, True
    if not image.has_transparency_data:
        rgb, sound = _srgb(image)
        return rgb, None, sound
    layers = image.convert("RGBA")
    alpha = layers.getchannel("A")
    rgb = layers.convert("RGB")  # drops the alpha, keeps the colors beneath
    rgb.info["icc_profile"] = image.info.get("icc_profile")
    rgb, sound = _srgb(rgb)
    if np.asarray(alpha).min(initial=255) == 255:
        return rgb, None, sound
    return Image.composite(rgb, Image.new("RGB", rgb.size, background), alpha), alpha, sound


def _eight_bits(image: Image.Image) -> np.ndarray[Any, Any]:
    """Of the readable formats only 16-bit grey PNGs get here, whatever their brightest pixel."""
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
            converted = None  # a broken or foreign profile is worth less than none
        return converted or image.convert("RGB"), converted is not None
    return image.convert("RGB"), True
