"""Scenes and their captions, drawn at random from ``(seed, index)``."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from . import vocabulary as world
from .families import EYES
from .vocabulary import Variant, with_article

TEST_SEED, PROBE_SEED, UNSEEN_SEED = 900_001, 900_002, 900_003  # scenes for measurements: no training stage draws them


@dataclass(frozen=True)
class SceneObject:
    """One object: an emoji's sprite name or a family variant, and its color (None: the sprite's own)."""

    sprite: str | Variant
    color: str | None = None

    @property
    def class_word(self) -> str:
        """The class word that captions use."""
        return self.sprite.family if isinstance(self.sprite, Variant) else world.class_word_of(self.sprite)


@dataclass(frozen=True)
class Background:
    """A background: a scene kind, or a pattern with one or two colors."""

    kind: str
    color: str = ""
    second_color: str = ""

    @property
    def phrase(self) -> str:
        """Its words in a caption, such as "in the snow" or "on a red and white striped background"."""
        if self.kind in world.SCENES:
            return world.SCENES[self.kind]
        if self.kind == "solid":
            return f"on {with_article(self.color)} background"
        return f"on {with_article(self.color)} and {self.second_color} {self.kind} background"


@dataclass(frozen=True)
class Scene:
    """Everything the renderer needs. ``jitter`` seeds what the caption leaves open (exact positions, clouds, peaks)."""

    objects: tuple[SceneObject, ...]
    background: Background
    caption: str
    jitter: int
    size: str = ""
    position: str = ""
    accessory: str = ""
    tree: bool = False


_EMOJI = world.training_emoji()
_BY_CLASS = {c: tuple(e.name for e in _EMOJI if e.class_word == c) for c in world.CLASS_WORDS}
_COLORS = tuple(world.COLORS)
_SCENES = tuple(world.SCENES)
# Families have many variants, so they are drawn more often than one class in twenty-one.
_CLASS_DRAW = (*tuple(c for c in world.CLASS_WORDS if c not in world.FAMILIES), "monster", "monster", "mug", "robot")


def _generator(seed: int, index: int) -> Random:
    return Random(seed * 1_000_003 + index)


def random_object(rng: Random, tint: float = 0.14) -> tuple[SceneObject, str]:
    """A training object and its noun phrase without article, such as "blue dog". ``tint``: chance of a new color."""
    word = rng.choice(_CLASS_DRAW)
    if word in world.FAMILIES:
        variant, color = rng.choice(world.VARIANTS[word]), rng.choice(_COLORS)
        name = variant.name if rng.random() < 0.4 and not variant.name.startswith("plain") else word
        return SceneObject(variant, color), f"{color} {name}" if rng.random() < 0.8 else name
    sprite = rng.choice(_BY_CLASS[word])
    name = sprite if rng.random() < 0.5 else word
    if rng.random() < tint:
        color = rng.choice(_COLORS)
        return SceneObject(sprite, color), f"{color} {name}"
    return SceneObject(sprite), name


def random_background(rng: Random, avoid: str | None = None) -> Background:
    """A background: 55% scenes, 23% plain colors, 22% patterns. ``avoid``: the object's color, never the main one."""
    draw = rng.random()
    if draw < 0.55:
        return Background(rng.choice(_SCENES))
    color = rng.choice([c for c in _COLORS if c != avoid])
    if draw < 0.78:
        return Background("solid", color)
    second = rng.choice([c for c in _COLORS if c != color])
    return Background(rng.choice(world.PATTERNS[1:]), color, second)


def rare_word(rng: Random) -> str:
    """A meaningless word: one of ``RARE_WORDS``, or two to five random letters."""
    if rng.random() < 0.6:
        return rng.choice(world.RARE_WORDS)
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randrange(2, 6)))


def random_scene(seed: int, index: int) -> Scene:
    """The scene of a seed and an index; the same pair always gives the same scene."""
    rng = _generator(seed, index)
    return scene_with(rng, *random_object(rng))


def scene_pair(seed: int, index: int) -> tuple[Scene, Scene]:
    """Two scenes around the same object, often in an unusual color: a positive pair for the judge's subject loss."""
    rng = _generator(seed, index)
    subject, phrase = random_object(rng, tint=0.5)
    return scene_with(rng, subject, phrase), scene_with(rng, subject, phrase)


def scene_with(rng: Random, subject: SceneObject, phrase: str) -> Scene:
    """A random scene around an object that the caption calls ``phrase``."""
    background = random_background(rng, avoid=subject.color)
    objects: tuple[SceneObject, ...] = (subject,)
    size = position = accessory = ""
    tree = False
    draw = rng.random()
    if draw < 0.06:
        n = rng.choice((2, 2, 3))
        objects = (subject,) * n
        color = phrase.split()[0] if phrase.split()[0] in world.COLORS else ""
        words = [world.NUMBERS[n], color, world.plural(subject.class_word)]
        text = " ".join(w for w in words if w)
    else:
        if draw < 0.15:
            size = rng.choice(("small", "small", "big"))
            phrase = f"{size} {phrase}"
        if rng.random() < 0.05:
            # Rebuilt, because the phrase may end in a specific name, and a rare word stands before the class word.
            color = f"{subject.color} " if subject.color and rng.random() < 0.5 else ""
            phrase = f"{size} " * bool(size) + f"{rare_word(rng)} {color}{subject.class_word}"
        text = with_article(phrase)
        if 0.15 <= draw < 0.31:
            accessory = rng.choice(world.ACCESSORIES)
            if accessory == "sunglasses" and not has_eyes(subject):
                accessory = "crown"
            text += " wearing " + (accessory if accessory == "sunglasses" else with_article(accessory))
        elif 0.31 <= draw < 0.39:
            tree = True
            text += " next to a tree"
        elif 0.39 <= draw < 0.47:
            other, other_phrase = random_object(rng, tint=0.1)
            objects = (subject, other)
            text += f" next to {with_article(other_phrase)}"
    text = f"{text} {background.phrase}"
    if len(objects) == 1 and not tree and rng.random() < 0.08:
        position = rng.choice(tuple(world.POSITIONS))
        text += f" {world.POSITIONS[position]}"
    if rng.random() < 0.08:
        text = f"{rng.choice(world.ARTISTIC)} {text}"
    return Scene(objects, background, text, rng.getrandbits(32), size, position, accessory, tree)


def has_eyes(item: SceneObject) -> bool:
    """Whether the object has eyes to put glasses on."""
    if isinstance(item.sprite, Variant):
        return item.sprite.family in EYES
    return world.EMOJI_BY_NAME[item.sprite].eyes is not None
