"""Backgrounds of plain shapes: colored patterns and thirteen kinds of scene, drawn at twice the image size."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from random import Random

from PIL import Image, ImageDraw

from .families import RGB, mix
from .vocabulary import COLORS

SIDE = 64  # of an image, in pixels
CANVAS = 2 * SIDE  # of the drawing, which is reduced at the end


@cache
def _gradient(top: RGB, bottom: RGB, height: int) -> Image.Image:
    column = Image.new("RGB", (1, height))
    column.putdata([mix(top, bottom, y / max(1, height - 1)) for y in range(height)])
    return column.resize((CANVAS, height))


def _split(sky: tuple[RGB, RGB], ground: tuple[RGB, RGB], horizon: int) -> Image.Image:
    image = Image.new("RGB", (CANVAS, CANVAS))
    image.paste(_gradient(*sky, horizon), (0, 0))
    image.paste(_gradient(*ground, CANVAS - horizon), (0, horizon))
    return image


_BLUE_SKY: tuple[RGB, RGB] = ((86, 168, 240), (190, 226, 252))


def _cloud(d: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    for dx, dy, k in ((-1.1, 0.25, 0.7), (0.0, 0.0, 1.0), (1.1, 0.25, 0.7)):
        d.ellipse(
            (x + dx * r - k * r, y + dy * r - k * r, x + dx * r + k * r, y + dy * r + k * r), fill=(255, 255, 255)
        )


def _pine(d: ImageDraw.ImageDraw, x: float, base: float, h: float) -> None:
    d.rectangle((x - 3, base - 8, x + 3, base), fill=(96, 62, 38))
    for top, bottom, half in ((1.0, 0.5, 0.22), (0.75, 0.12, 0.32)):
        d.polygon(
            [(x, base - h * top), (x - h * half, base - h * bottom), (x + h * half, base - h * bottom)],
            fill=(28, 104, 62),
        )


Painter = Callable[[int, Random], Image.Image]
"""Paints a scene from the row of its horizon and a generator for the rest (positions of clouds, peaks, the sun)."""


def _snow(h: int, rng: Random) -> Image.Image:
    image = _split(((150, 190, 222), (206, 224, 238)), ((250, 252, 255), (232, 240, 250)), h)
    d = ImageDraw.Draw(image)
    for _ in range(14):
        x, y = rng.randrange(CANVAS), rng.randrange(h)
        d.ellipse((x - 2, y - 2, x + 2, y + 2), fill=(255, 255, 255))
    return image


def _beach(h: int, rng: Random) -> Image.Image:
    image = _split(_BLUE_SKY, ((248, 220, 158), (238, 204, 136)), h)
    ImageDraw.Draw(image).rectangle((0, h - 20, CANVAS, h), fill=(38, 134, 210))
    return image


def _road(h: int, rng: Random) -> Image.Image:
    image = _split(_BLUE_SKY, ((104, 106, 112), (84, 86, 92)), h)
    d = ImageDraw.Draw(image)
    d.rectangle((0, h, CANVAS, h + 6), fill=(92, 176, 82))
    shift = rng.randrange(-20, 20)
    for x in range(-40, CANVAS + 40, 48):
        d.rectangle((x + shift, h + 26, x + shift + 26, h + 32), fill=(250, 246, 226))
    return image


def _forest(h: int, rng: Random) -> Image.Image:
    image = _split(((168, 216, 190), (206, 234, 206)), ((84, 148, 70), (64, 122, 56)), h)
    d = ImageDraw.Draw(image)
    for i in range(5):
        _pine(d, i * 30 + rng.randrange(-6, 14), h + 6, rng.randrange(52, 70))
    return image


def _sky(h: int, rng: Random) -> Image.Image:
    image = _gradient((66, 150, 238), (182, 222, 252), CANVAS).copy()
    d = ImageDraw.Draw(image)
    for i in range(3):
        _cloud(d, rng.randrange(10, 118), 18 + 40 * i + rng.randrange(-8, 8), rng.randrange(9, 14))
    return image


def _sea(h: int, rng: Random) -> Image.Image:
    image = _split(_BLUE_SKY, ((30, 120, 206), (18, 82, 168)), h - 14)
    d = ImageDraw.Draw(image)
    for _ in range(7):
        x, y = rng.randrange(CANVAS), rng.randrange(h, CANVAS - 4)
        d.rectangle((x, y, x + 16, y + 3), fill=(120, 190, 240))
    return image


def _night(h: int, rng: Random) -> Image.Image:
    image = _split(((12, 16, 52), (34, 40, 92)), ((24, 48, 44), (16, 34, 34)), h + 14)
    d = ImageDraw.Draw(image)
    for _ in range(16):
        x, y = rng.randrange(CANVAS), rng.randrange(h)
        d.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), fill=(255, 250, 210))
    x = rng.choice((20, 106))
    d.ellipse((x - 12, 8, x + 12, 32), fill=(252, 244, 200))
    return image


def _sunset(h: int, rng: Random) -> Image.Image:
    image = _split(((112, 50, 130), (252, 146, 62)), ((92, 40, 78), (62, 26, 60)), h + 8)
    x = rng.randrange(20, 108)
    ImageDraw.Draw(image).pieslice((x - 20, h - 12, x + 20, h + 28), 180, 360, fill=(255, 226, 110))
    return image


def _desert(h: int, rng: Random) -> Image.Image:
    image = _split(((252, 206, 140), (254, 232, 188)), ((232, 168, 92), (214, 142, 70)), h)
    x = rng.randrange(0, 90)
    ImageDraw.Draw(image).ellipse((x - 70, h - 14, x + 60, h + 40), fill=(236, 176, 102))
    return image


def _table(h: int, rng: Random) -> Image.Image:
    image = _split(((214, 226, 214), (224, 234, 222)), ((176, 118, 66), (150, 96, 50)), h)
    d = ImageDraw.Draw(image)
    for y in range(h + 14, CANVAS, 18):
        d.rectangle((0, y, CANVAS, y + 2), fill=(126, 78, 40))
    return image


def _wall(h: int, rng: Random) -> Image.Image:
    image = _bricks().copy()
    ImageDraw.Draw(image).rectangle((0, 108, CANVAS, CANVAS), fill=(150, 150, 154))
    return image


def _grass(h: int, rng: Random) -> Image.Image:
    image = _split(_BLUE_SKY, ((96, 190, 76), (62, 156, 52)), h)
    _cloud(ImageDraw.Draw(image), rng.randrange(10, 118), rng.randrange(12, 30), 9)
    return image


def _mountains(h: int, rng: Random) -> Image.Image:
    image = _split(_BLUE_SKY, ((120, 182, 92), (92, 154, 72)), h + 10)
    d = ImageDraw.Draw(image)
    for i in range(3):
        x, top = i * 50 + rng.randrange(0, 24), rng.randrange(14, 30)
        d.polygon([(x, top), (x - 44, h + 10), (x + 44, h + 10)], fill=(118, 124, 150))
        d.polygon([(x, top), (x - 13, top + 16), (x + 13, top + 16)], fill=(255, 255, 255))
    return image


PAINTERS: dict[str, Painter] = {
    "snow": _snow, "beach": _beach, "road": _road, "forest": _forest, "sky": _sky, "sea": _sea, "night": _night,
    "sunset": _sunset, "desert": _desert, "table": _table, "wall": _wall, "grass": _grass, "mountains": _mountains,
}  # fmt: skip
WITH_GROUND = PAINTERS.keys() - {"sky"}
"""Scene kinds in which objects stand on the ground."""


def scene(kind: str, rng: Random) -> Image.Image:
    """A scene of that kind. ``rng`` draws what varies: horizon, clouds, peaks."""
    return PAINTERS[kind](rng.randrange(58, 76), rng)


@cache
def _bricks() -> Image.Image:
    image = Image.new("RGB", (CANVAS, CANVAS), (222, 196, 180))
    d = ImageDraw.Draw(image)
    for row in range(8):
        for x in range(-16 if row % 2 else 0, CANVAS, 32):
            d.rectangle((x, row * 16, x + 28, row * 16 + 12), fill=(178, 76, 58))
    return image


@cache
def _pattern(kind: str, color: str, second_color: str) -> Image.Image:
    image = Image.new("RGB", (CANVAS, CANVAS), COLORS[color])
    d = ImageDraw.Draw(image)
    if kind == "striped":
        for y in range(16, CANVAS, 32):
            d.rectangle((0, y, CANVAS, y + 15), fill=COLORS[second_color])
    elif kind == "checkered":
        for y in range(0, CANVAS, 32):
            for x in range(32 if y % 64 else 0, CANVAS, 64):
                d.rectangle((x, y, x + 31, y + 31), fill=COLORS[second_color])
    elif kind == "dotted":
        for y in range(16, CANVAS, 32):
            for x in range(16, CANVAS, 32):
                d.ellipse((x - 8, y - 8, x + 8, y + 8), fill=COLORS[second_color])
    return image


def pattern(kind: str, color: str, second_color: str) -> Image.Image:
    """A solid background (``second_color`` unused) or one of two colors: striped, checkered or dotted."""
    return _pattern(kind, color, second_color).copy()
