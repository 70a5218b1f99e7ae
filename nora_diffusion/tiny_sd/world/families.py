"""Procedural families (monsters, mugs, robots), supersampled four times in each direction."""

from __future__ import annotations

from PIL import Image, ImageDraw

from .sprites import CELL
from .vocabulary import COLORS, Variant

_SS = 4  # supersampling factor
_S = CELL * _SS
RGB = tuple[int, int, int]
# Where a hat and glasses sit, in fractions of the image; a mug has no eyes.
HEADS = {"monster": (0.5, 0.2), "mug": (0.42, 0.06), "robot": (0.5, 0.14)}
EYES = {"monster": (0.5, 0.42), "robot": (0.5, 0.32)}


def mix(a: RGB, b: RGB, t: float) -> RGB:
    """Linear blend ``(1 - t) a + t b``."""
    return (round(a[0] + (b[0] - a[0]) * t), round(a[1] + (b[1] - a[1]) * t), round(a[2] + (b[2] - a[2]) * t))


def _box(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
    return (x0 * _S, y0 * _S, x1 * _S, y1 * _S)


def _shades(color: str) -> tuple[RGB, RGB, RGB]:
    base = COLORS[color]
    dark = (88, 88, 96) if color == "black" else mix(base, (0, 0, 0), 0.32)
    return base, dark, mix(base, (255, 255, 255), 0.55) if color != "white" else (206, 214, 224)


def _eye(d: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    d.ellipse(_box(x - r, y - r, x + r, y + r), fill=(255, 255, 255), outline=(40, 40, 40), width=_SS)
    d.ellipse(_box(x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=(20, 20, 24))


def _monster(d: ImageDraw.ImageDraw, parts: tuple[str, ...], color: str) -> None:
    body, eyes, top, belly = parts
    base, dark, light = _shades(color)
    for x in (0.3, 0.7):
        d.ellipse(_box(x - 0.12, 0.84, x + 0.12, 1.0), fill=dark)
        if top == "horns":
            tip = x - 0.14 if x < 0.5 else x + 0.14
            d.polygon([(_S * (x - 0.09), _S * 0.3), (_S * (x + 0.09), _S * 0.3), (_S * tip, 0.0)], fill=(250, 234, 190))
        elif top == "antennae":
            tip = x - 0.06 if x < 0.5 else x + 0.06
            d.line([(_S * x, _S * 0.3), (_S * tip, _S * 0.08)], fill=dark, width=5 * _SS)
            d.ellipse(
                _box(tip - 0.07, 0.01, tip + 0.07, 0.15), fill=(250, 214, 48) if color != "yellow" else (222, 38, 44)
            )
        else:
            d.ellipse(_box(x - 0.15, 0.04, x + 0.15, 0.34), fill=base)
            d.ellipse(_box(x - 0.08, 0.1, x + 0.08, 0.28), fill=light)
    d.line([(_S * 0.04, _S * 0.48), (_S * 0.25, _S * 0.64)], fill=dark, width=9 * _SS)
    d.line([(_S * 0.96, _S * 0.48), (_S * 0.75, _S * 0.64)], fill=dark, width=9 * _SS)
    if body == "round":
        d.ellipse(_box(0.13, 0.18, 0.87, 0.94), fill=base)
    elif body == "square":
        d.rounded_rectangle(_box(0.16, 0.18, 0.84, 0.92), radius=0.1 * _S, fill=base)
    else:
        d.ellipse(_box(0.25, 0.16, 0.75, 0.64), fill=base)
        d.ellipse(_box(0.1, 0.42, 0.9, 0.96), fill=base)
    if belly == "belly":
        d.ellipse(_box(0.29, 0.6, 0.71, 0.9), fill=light)
    eye_rows = {  # (x, radius) of each eye
        "one-eyed": ((0.5, 0.16),),
        "two-eyed": ((0.36, 0.12), (0.64, 0.12)),
        "three-eyed": ((0.29, 0.095), (0.5, 0.095), (0.71, 0.095)),
    }[eyes]
    for x, r in eye_rows:
        _eye(d, x, 0.4, r)
    d.arc(_box(0.36, 0.46, 0.64, 0.7), 20, 160, fill=(40, 20, 24), width=4 * _SS)


def _heart(d: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: RGB) -> None:
    d.ellipse(_box(x - r, y - r, x, y), fill=fill)
    d.ellipse(_box(x, y - r, x + r, y), fill=fill)
    d.polygon(
        [(_S * (x - 0.94 * r), _S * (y - 0.3 * r)), (_S * (x + 0.94 * r), _S * (y - 0.3 * r)), (_S * x, _S * (y + r))],
        fill=fill,
    )


def _mug(d: ImageDraw.ImageDraw, parts: tuple[str, ...], color: str) -> None:
    print_, shape = parts
    base, dark, _ = _shades(color)
    ink: RGB = (255, 255, 255) if color not in ("white", "yellow", "pink") else (200, 30, 60)
    x0, x1, y0 = (0.16, 0.68, 0.06) if shape == "tall" else (0.06, 0.74, 0.24)
    d.ellipse(_box(x1 - 0.14, 0.34, x1 + 0.26, 0.78), outline=dark, width=9 * _SS)
    d.rounded_rectangle(_box(x0, y0 + 0.05, x1, 0.96), radius=0.07 * _S, fill=base)
    if print_ == "dotted":
        for y in (0.45, 0.62, 0.79):
            for x in (0.2, 0.5, 0.8):
                cx = x0 + (x1 - x0) * x
                d.ellipse(_box(cx - 0.055, y - 0.055, cx + 0.055, y + 0.055), fill=ink)
    elif print_ == "striped":
        for y in (0.4, 0.58, 0.76):
            d.rectangle(_box(x0, y, x1, y + 0.09), fill=ink)
    elif print_ == "heart":
        _heart(d, (x0 + x1) / 2, 0.6, 0.19, ink if ink != (255, 255, 255) or color != "red" else (255, 240, 244))
    d.ellipse(_box(x0, y0, x1, y0 + 0.15), fill=dark)
    d.ellipse(_box(x0 + 0.04, y0 + 0.03, x1 - 0.04, y0 + 0.12), fill=(92, 54, 30))


def _robot(d: ImageDraw.ImageDraw, parts: tuple[str, ...], color: str) -> None:
    head, eyes, top, chest = parts
    base, dark, light = _shades(color)
    gray: RGB = (150, 156, 166)
    if top == "antenna":
        d.line([(_S * 0.5, _S * 0.16), (_S * 0.5, _S * 0.06)], fill=gray, width=4 * _SS)
        d.ellipse(_box(0.44, 0.0, 0.56, 0.12), fill=(240, 60, 50) if color != "red" else (250, 214, 48))
    else:
        d.rectangle(_box(0.12, 0.25, 0.88, 0.37), fill=gray)
    for x in (0.36, 0.64):
        d.rectangle(_box(x - 0.07, 0.84, x + 0.07, 0.95), fill=gray)
        d.rounded_rectangle(_box(x - 0.12, 0.92, x + 0.12, 1.0), radius=0.03 * _S, fill=dark)
    d.rounded_rectangle(_box(0.06, 0.56, 0.94, 0.68), radius=0.05 * _S, fill=gray)
    if head == "dome":
        d.pieslice(_box(0.2, 0.12, 0.8, 0.92), 180, 360, fill=base)
    else:
        d.rounded_rectangle(_box(0.2, 0.13, 0.8, 0.52), radius=0.05 * _S, fill=base)
    d.rounded_rectangle(_box(0.24, 0.54, 0.76, 0.86), radius=0.05 * _S, fill=base)
    if eyes == "visor":
        d.rounded_rectangle(_box(0.27, 0.26, 0.73, 0.41), radius=0.06 * _S, fill=(24, 28, 44))
        d.rectangle(_box(0.33, 0.31, 0.67, 0.36), fill=(96, 240, 255))
    for x in (0.37, 0.63):
        if eyes == "square-eyed":
            d.rectangle(_box(x - 0.08, 0.25, x + 0.08, 0.4), fill=(255, 255, 255))
            d.rectangle(_box(x - 0.035, 0.29, x + 0.035, 0.37), fill=(20, 20, 30))
        elif eyes == "round-eyed":
            _eye(d, x, 0.33, 0.09)
    if chest == "gauge":
        d.ellipse(_box(0.38, 0.58, 0.62, 0.82), fill=light)
        d.line([(_S * 0.5, _S * 0.7), (_S * 0.56, _S * 0.62)], fill=(220, 40, 40), width=3 * _SS)
    else:
        for x, c in ((0.35, (240, 60, 50)), (0.5, (250, 214, 48)), (0.65, (80, 200, 90))):
            d.ellipse(_box(x - 0.055, 0.65, x + 0.055, 0.76), fill=c)


def draw_variant(variant: Variant, color: str) -> Image.Image:
    """RGBA image of a family member in one of the named colors, ``CELL`` x ``CELL``."""
    image = Image.new("RGBA", (_S, _S))
    painter = {"monster": _monster, "mug": _mug, "robot": _robot}[variant.family]
    painter(ImageDraw.Draw(image), variant.parts, color)
    return image.convert("RGBa").reduce(_SS).convert("RGBA")
