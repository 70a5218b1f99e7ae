"""Convert images to 8-bit sRGB: 16-bit gray, CMYK, palettes, color profiles, transparency."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms, ImageColor

from ..errors import UserError

WHITE = (255, 255, 255)
ROWS = 64
Color = tuple[int, int, int]


def color(name: str) -> Color:
    """Red, green and blue of a CSS name or ``#rrggbb``. Raises :class:`UserError`."""
    try:
        return ImageColor.getrgb(name.strip())[:3]
    except ValueError as error:
        raise UserError(f"background={name!r} is not a color: give a name such as white or gray, or #rrggbb") from error


def to_rgb(image: Image.Image, background: Color = WHITE) -> tuple[Image.Image, Image.Image | None, list[str]]:
    """The image in 8-bit sRGB on ``background``, its alpha channel (mode ``L``), ``None`` if it is opaque, and remarks.

    A broken color profile is ignored. The gamma of a PNG is applied if the file has no profile.
    """
    alpha = _alpha(image)
    colors, profile = _without_alpha(image), image.info.get("icc_profile")
    exponent = _gamma_exponent(image) if profile is None else 1.0
    colors = _eight_bits(colors, exponent) if colors.mode.startswith("I") else _with_gamma(colors, exponent)
    rgb, profile_ok = _srgb(colors, profile)
    remarks = [] if profile_ok else ["its color profile is broken, so its colors are taken as sRGB"]
    remarks += [f"its gamma of {image.info['gamma']:.3g} is converted to that of sRGB"] if exponent != 1 else []
    if alpha is None:
        return rgb, None, remarks
    filled = Image.new("RGB", rgb.size, background)
    filled.paste(rgb, mask=alpha)
    return filled, alpha, remarks


def _alpha(image: Image.Image) -> Image.Image | None:
    if not image.has_transparency_data:
        return None
    if image.mode.startswith("I"):
        visible = np.asarray(image) != image.info["transparency"]
        alpha = Image.fromarray(visible.astype(np.uint8) * 255)
    else:
        alpha = (image if image.mode in ("RGBA", "LA") else image.convert("RGBA")).getchannel("A")
    return None if alpha.getextrema() == (255, 255) else alpha


def _without_alpha(image: Image.Image) -> Image.Image:
    """The colors, also where the image is transparent; gray stays gray, since its profile is for gray."""
    if image.mode.startswith("I") or image.mode in ("L", "RGB", "CMYK"):
        return image
    return image.convert("L" if image.mode == "LA" else "RGB")


def _gamma_exponent(image: Image.Image) -> float:
    """``1 / (2.2 gamma)`` of a PNG; 1 without a gamma, or if it is within 5 percent of sRGB's, as in libpng."""
    gamma = float(image.info.get("gamma", 0))
    if "srgb" in image.info or not 0.05 <= gamma <= 20 or abs(2.2 * gamma - 1) <= 0.05:
        return 1.0
    return 1 / (2.2 * gamma)


def _with_gamma(image: Image.Image, exponent: float) -> Image.Image:
    if exponent == 1:
        return image
    table = [round(255 * (value / 255) ** exponent) for value in range(256)]
    return image.point(table * len(image.getbands()))


def _eight_bits(image: Image.Image, exponent: float) -> Image.Image:
    """Scale 16-bit gray PNGs, the only readable format with these modes, from 0..65535 to 0..255.

    By a table and some rows at a time: in floats, a large image would take eight times its memory.
    """
    table = np.round((np.arange(65536) / 65535) ** exponent * 255).astype(np.uint8)
    pixels = np.asarray(image)
    found = np.empty(pixels.shape, np.uint8)
    for start in range(0, len(pixels), ROWS):
        found[start : start + ROWS] = table[np.clip(pixels[start : start + ROWS], 0, 65535)]
    return Image.fromarray(found)


def _srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, bool]:
    """The image in sRGB, and whether its color profile could be applied."""
    if profile is None or image.mode not in ("RGB", "CMYK", "L"):
        return image.convert("RGB"), True
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        converted = None
    return converted or image.convert("RGB"), converted is not None
