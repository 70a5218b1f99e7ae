"""From a scene to pixels: ``render(scene)`` gives a (64, 64, 3) uint8 array, the same one every time."""

from __future__ import annotations

from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from . import backgrounds
from . import vocabulary as world
from .families import EYES, HEADS, draw_variant
from .scenes import Scene, Thing, random_scene
from .sprites import sprite
from .vocabulary import COLORS, Variant

SIDE = 64
_CANVAS = backgrounds.SIZE
_EMOJI = {e.name: e for e in world.EMOJI}


def tint(image: Image.Image, color: str) -> Image.Image:
    """Recolor by brightness: dark stays dark, the middle takes the color, light stays light."""
    if color == "black":
        dark, middle, light = (8, 8, 10), (52, 52, 58), (176, 176, 184)
    elif color == "white":
        dark, middle, light = (96, 98, 106), (232, 232, 236), (255, 255, 255)
    else:
        dark, middle, light = (24, 18, 22), COLORS[color], (250, 248, 246)
    grey = ImageOps.autocontrast(
        image.convert("RGB").convert("L"), mask=image.getchannel("A").point(lambda a: 255 * (a > 128))
    )
    out = ImageOps.colorize(grey, dark, light, mid=middle, midpoint=130).convert("RGBA")
    out.putalpha(image.getchannel("A"))
    return out


@lru_cache(maxsize=4096)
def cut_out(thing: Thing) -> Image.Image:
    """The RGBA cut-out of a thing in its color (premultiplied, so that resizing keeps its edges clean)."""
    if isinstance(thing.sprite, Variant):
        image = draw_variant(thing.sprite, thing.color or "red")
    else:
        image = sprite(thing.sprite)
        image = tint(image, thing.color) if thing.color else image
    return image.convert("RGBa")


@lru_cache(maxsize=16)
def _prop(name: str) -> Image.Image:
    if name != "party hat":
        return sprite(name).convert("RGBa")
    big = Image.new("RGBA", (384, 384))
    d = ImageDraw.Draw(big)
    d.polygon([(192, 20), (60, 380), (324, 380)], fill=(236, 64, 150))
    for t0, t1 in ((0.3, 0.47), (0.64, 0.81)):
        y0, y1 = 20 + 360 * t0, 20 + 360 * t1
        d.polygon(
            [(192 - 132 * t0, y0), (192 + 132 * t0, y0), (192 + 132 * t1, y1), (192 - 132 * t1, y1)],
            fill=(255, 224, 70),
        )
    d.ellipse((156, 0, 228, 72), fill=(70, 200, 240))
    return big.convert("RGBa").reduce(4).crop((14, 0, 82, 96))


@lru_cache(maxsize=256)
def _head(thing: Thing) -> tuple[float, float, float]:
    """(x, y, hat width) of the hat's base, as fractions of the cut-out."""
    if isinstance(thing.sprite, Variant):
        return (*HEADS[thing.sprite.family], 0.5)
    e = _EMOJI[thing.sprite]
    if e.head:
        return (*e.head, e.hat)
    alpha = np.asarray(cut_out(thing).getchannel("a"))
    rows = alpha[: max(2, alpha.shape[0] // 6)]
    xs = np.nonzero(rows > 128)[1]
    return float(xs.mean()) / alpha.shape[1] if len(xs) else 0.5, 0.06, 0.5


def _eyes(thing: Thing) -> tuple[float, float]:
    if isinstance(thing.sprite, Variant):
        return EYES[thing.sprite.family]
    return _EMOJI[thing.sprite].eyes or (0.5, 0.4)


def _paste(canvas: Image.Image, image: Image.Image, x: float, y: float) -> None:
    """Paste a premultiplied cut-out with its top left corner at (x, y)."""
    canvas.paste(image.convert("RGBA"), (round(x), round(y)), image.getchannel("a"))


def _scaled(image: Image.Image, factor: float) -> Image.Image:
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=1.5)


def _beside(scene: Scene) -> bool:
    """Whether the first thing, the subject, has a tree or another thing beside it (and not more of its own kind)."""
    return scene.tree or len(set(scene.things)) > 1


def _sides(scene: Scene, rng: Random) -> tuple[float, float]:
    """The longer sides of the first thing and of every other, in canvas units: no part so small that it blurs."""
    if _beside(scene):
        return rng.uniform(0.54, 0.60) * _CANVAS, rng.uniform(0.45, 0.50) * _CANVAS
    n = len(scene.things)
    if n > 1:
        side = (1.04 if n == 2 else 0.98) * _CANVAS / n * rng.uniform(0.9, 1.0)
        return side, side
    low, high = {"small": (0.38, 0.46), "big": (0.84, 0.94)}.get(scene.size, (0.62, 0.76))
    if scene.accessory and scene.accessory != "sunglasses":
        low, high = min(low, 0.54), min(high, 0.68)
    side = rng.uniform(low, high) * _CANVAS
    return side, side


def _place(scene: Scene, rng: Random, i: int, side: float, mirrored: bool) -> tuple[float, float]:
    """Center x and bottom y, in canvas units, of the i-th thing (a tree is the second) of longer side ``side``."""
    n = len(scene.things)
    if _beside(scene):
        x = (0.29, 0.77)[i]
        x = (1 - x if mirrored else x) * _CANVAS
    elif n > 1:
        x = _CANVAS * (2 * i + 1) / (2 * n)
    elif scene.position:
        x = 0.3 * _CANVAS if scene.position == "left" else 0.7 * _CANVAS
    else:
        x = 0.5 * _CANVAS + rng.uniform(-3, 3)
    if scene.ground.kind in backgrounds.GROUND:
        bottom = rng.uniform(113, 119)
        return x, min(bottom + max(0.0, side - 96) / 4, 126)
    return x, 0.5 * _CANVAS + side / 2 + rng.uniform(-3, 3)


def _dress(canvas: Image.Image, scene: Scene, thing: Thing, box: tuple[float, float, float, float]) -> None:
    x0, y0, w, h = box
    prop = _prop(scene.accessory)
    if scene.accessory == "sunglasses":
        fx, fy = _eyes(thing)
        width = 0.66 * w
        image = _scaled(prop, width / prop.width)
        _paste(canvas, image, x0 + fx * w - width / 2, y0 + fy * h - image.height / 2)
        return
    fx, fy, hat = _head(thing)
    width = hat * max(w, 0.7 * h) * {"crown": 1.0, "party hat": 0.8, "sun hat": 1.3}.get(scene.accessory, 1.1)
    image = _scaled(prop, width / prop.width)
    x, y = x0 + fx * w - image.width / 2, y0 + fy * h + 0.06 * h - image.height
    _paste(canvas, image, min(max(x, 0), _CANVAS - image.width), max(y, 0))


def render(scene: Scene) -> np.ndarray:
    """Draw the scene: uint8 array of shape (64, 64, 3), RGB."""
    rng = Random(scene.jitter)
    ground = scene.ground
    if ground.kind in world.SCENES:
        canvas = backgrounds.scene(ground.kind, rng)
    else:
        canvas = backgrounds.pattern(ground.kind, ground.a, ground.b)
    first, other = _sides(scene, rng)
    mirrored = scene.tree and rng.random() < 0.5
    if scene.tree:
        tree = _scaled(_prop("tree"), 1.1 * other / 96)
        cx, bottom = _place(scene, rng, 1, 1.1 * other, mirrored)
        _paste(canvas, tree, cx - tree.width / 2, bottom - tree.height)
    for i, thing in enumerate(scene.things):
        side = other if i else first
        image = cut_out(thing)
        image = _scaled(image, side / max(image.size))
        cx, bottom = _place(scene, rng, i, side, mirrored)
        if ground.kind not in backgrounds.GROUND:
            bottom -= (side - image.height) / 2
        y = bottom - image.height
        if scene.accessory and scene.accessory != "sunglasses":
            y = max(y, 22 - _head(thing)[1] * image.height) + 4  # leave room for the hat
        _paste(canvas, image, cx - image.width / 2, y)
        if scene.accessory:
            _dress(canvas, scene, thing, (cx - image.width / 2, y, image.width, image.height))
    return np.array(canvas.reduce(2))


def sample(seed: int, index: int) -> tuple[np.ndarray, str]:
    """Picture and caption of the training scene ``(seed, index)``."""
    scene = random_scene(seed, index)
    return render(scene), scene.caption
