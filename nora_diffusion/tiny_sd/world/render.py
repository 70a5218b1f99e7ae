"""From a scene to pixels: ``render(scene)`` is a pure function and returns a (64, 64, 3) uint8 array."""

from __future__ import annotations

from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from . import backgrounds
from . import vocabulary as world
from .backgrounds import CANVAS
from .families import EYES, HEADS, draw_variant
from .scenes import Scene, SceneObject, random_scene
from .sprites import CELL, sprite
from .vocabulary import COLORS, EMOJI_BY_NAME, Variant


def tint(image: Image.Image, color: str) -> Image.Image:
    """Recolor by brightness: dark stays dark, the middle takes the color, light stays light."""
    if color == "black":
        dark, middle, light = (8, 8, 10), (52, 52, 58), (176, 176, 184)
    elif color == "white":
        dark, middle, light = (96, 98, 106), (232, 232, 236), (255, 255, 255)
    else:
        dark, middle, light = (24, 18, 22), COLORS[color], (250, 248, 246)
    gray = ImageOps.autocontrast(
        image.convert("RGB").convert("L"), mask=image.getchannel("A").point(lambda a: 255 * (a > 128))
    )
    out = ImageOps.colorize(gray, dark, light, mid=middle, midpoint=130).convert("RGBA")
    out.putalpha(image.getchannel("A"))
    return out


@lru_cache(maxsize=4096)
def cut_out(item: SceneObject) -> Image.Image:
    """The RGBA cut-out of an object in its color (premultiplied alpha, so that resizing keeps the edges clean)."""
    if isinstance(item.sprite, Variant):
        image = draw_variant(item.sprite, item.color or "red")
    else:
        image = sprite(item.sprite)
        image = tint(image, item.color) if item.color else image
    return image.convert("RGBa")


@lru_cache(maxsize=16)
def _prop(name: str) -> Image.Image:
    if name != "party hat":
        return sprite(name).convert("RGBa")
    big = Image.new("RGBA", (4 * CELL, 4 * CELL))
    d = ImageDraw.Draw(big)
    d.polygon([(192, 20), (60, 380), (324, 380)], fill=(236, 64, 150))
    for t0, t1 in ((0.3, 0.47), (0.64, 0.81)):
        y0, y1 = 20 + 360 * t0, 20 + 360 * t1
        d.polygon(
            [(192 - 132 * t0, y0), (192 + 132 * t0, y0), (192 + 132 * t1, y1), (192 - 132 * t1, y1)],
            fill=(255, 224, 70),
        )
    d.ellipse((156, 0, 228, 72), fill=(70, 200, 240))
    return big.convert("RGBa").reduce(4).crop((14, 0, 82, CELL))


@lru_cache(maxsize=256)
def _head(item: SceneObject) -> tuple[float, float, float]:
    """(x, y, hat width) of the hat's base, as fractions of the cut-out."""
    if isinstance(item.sprite, Variant):
        return (*HEADS[item.sprite.family], 0.5)
    emoji = EMOJI_BY_NAME[item.sprite]
    if emoji.head:
        return (*emoji.head, emoji.hat)
    alpha = np.asarray(cut_out(item).getchannel("a"))
    rows = alpha[: max(2, alpha.shape[0] // 6)]
    xs = np.nonzero(rows > 128)[1]
    return float(xs.mean()) / alpha.shape[1] if len(xs) else 0.5, 0.06, 0.5


def _eyes(item: SceneObject) -> tuple[float, float]:
    if isinstance(item.sprite, Variant):
        return EYES[item.sprite.family]
    return EMOJI_BY_NAME[item.sprite].eyes or (0.5, 0.4)


def _paste(canvas: Image.Image, image: Image.Image, x: float, y: float) -> None:
    """Paste a premultiplied cut-out with its top left corner at (x, y)."""
    canvas.paste(image.convert("RGBA"), (round(x), round(y)), image.getchannel("a"))


def _scaled(image: Image.Image, factor: float) -> Image.Image:
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=1.5)


def _has_companion(scene: Scene) -> bool:
    """Whether a tree or a different object stands beside the first object."""
    return scene.tree or len(set(scene.objects)) > 1


def _sides(scene: Scene, rng: Random) -> tuple[float, float]:
    """The longer side of the first object and of every other, in canvas units; large enough for 16 x 16 latents."""
    if _has_companion(scene):
        return rng.uniform(0.54, 0.60) * CANVAS, rng.uniform(0.45, 0.50) * CANVAS
    n = len(scene.objects)
    if n > 1:
        side = (1.04 if n == 2 else 0.98) * CANVAS / n * rng.uniform(0.9, 1.0)
        return side, side
    low, high = {"small": (0.38, 0.46), "big": (0.84, 0.94)}.get(scene.size, (0.62, 0.76))
    if scene.accessory and scene.accessory != "sunglasses":
        low, high = min(low, 0.54), min(high, 0.68)
    side = rng.uniform(low, high) * CANVAS
    return side, side


def _position(scene: Scene, rng: Random, i: int, side: float, mirrored: bool) -> tuple[float, float]:
    """Center x and bottom y, in canvas units, of object ``i`` (a tree is the second) whose longer side is ``side``."""
    n = len(scene.objects)
    if _has_companion(scene):
        x = (0.29, 0.77)[i]
        x = (1 - x if mirrored else x) * CANVAS
    elif n > 1:
        x = CANVAS * (2 * i + 1) / (2 * n)
    elif scene.position:
        x = 0.3 * CANVAS if scene.position == "left" else 0.7 * CANVAS
    else:
        x = 0.5 * CANVAS + rng.uniform(-3, 3)
    if scene.background.kind in backgrounds.WITH_GROUND:
        bottom = rng.uniform(113, 119)
        return x, min(bottom + max(0.0, side - 96) / 4, 126)
    return x, 0.5 * CANVAS + side / 2 + rng.uniform(-3, 3)


def _wear(canvas: Image.Image, accessory: str, item: SceneObject, box: tuple[float, float, float, float]) -> None:
    """Put the accessory on an object whose (left, top, width, height) on the canvas is ``box``."""
    x0, y0, w, h = box
    prop = _prop(accessory)
    if accessory == "sunglasses":
        fx, fy = _eyes(item)
        width = 0.66 * w
        image = _scaled(prop, width / prop.width)
        _paste(canvas, image, x0 + fx * w - width / 2, y0 + fy * h - image.height / 2)
        return
    fx, fy, hat = _head(item)
    width = hat * max(w, 0.7 * h) * {"crown": 1.0, "party hat": 0.8, "sun hat": 1.3}.get(accessory, 1.1)
    image = _scaled(prop, width / prop.width)
    x, y = x0 + fx * w - image.width / 2, y0 + fy * h + 0.06 * h - image.height
    _paste(canvas, image, min(max(x, 0), CANVAS - image.width), max(y, 0))


def render(scene: Scene) -> np.ndarray:
    """Draw the scene: uint8 array of shape (64, 64, 3), RGB."""
    rng = Random(scene.jitter)
    background = scene.background
    if background.kind in world.SCENES:
        canvas = backgrounds.scene(background.kind, rng)
    else:
        canvas = backgrounds.pattern(background.kind, background.color, background.second_color)
    first, other = _sides(scene, rng)
    mirrored = scene.tree and rng.random() < 0.5
    if scene.tree:
        tree = _scaled(_prop("tree"), 1.1 * other / CELL)
        cx, bottom = _position(scene, rng, 1, 1.1 * other, mirrored)
        _paste(canvas, tree, cx - tree.width / 2, bottom - tree.height)
    for i, item in enumerate(scene.objects):
        side = other if i else first
        image = cut_out(item)
        image = _scaled(image, side / max(image.size))
        cx, bottom = _position(scene, rng, i, side, mirrored)
        if background.kind not in backgrounds.WITH_GROUND:
            bottom -= (side - image.height) / 2
        y = bottom - image.height
        if scene.accessory and scene.accessory != "sunglasses":
            y = max(y, 22 - _head(item)[1] * image.height) + 4  # leave room for the hat
        _paste(canvas, image, cx - image.width / 2, y)
        if scene.accessory:
            _wear(canvas, scene.accessory, item, (cx - image.width / 2, y, image.width, image.height))
    return np.array(canvas.reduce(CANVAS // backgrounds.SIDE))


def sample(seed: int, index: int) -> tuple[np.ndarray, str]:
    """Image and caption of the scene ``(seed, index)``."""
    scene = random_scene(seed, index)
    return render(scene), scene.caption
