"""Scenes and their captions: what a picture holds, drawn at random from ``(seed, index)``."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from . import vocabulary as world
from .vocabulary import Variant


@dataclass(frozen=True)
class Thing:
    """One object: an emoji's sprite name or a family variant, and its color (None: its own)."""

    sprite: str | Variant
    color: str | None = None

    @property
    def class_word(self) -> str:
        """The class word that captions use."""
        return self.sprite.family if isinstance(self.sprite, Variant) else world.class_word_of(self.sprite)


@dataclass(frozen=True)
class Ground:
    """A background: a scene kind, or a pattern with one or two colors."""

    kind: str
    a: str = ""
    b: str = ""

    @property
    def phrase(self) -> str:
        """Its words in a caption, such as "in the snow" or "on a red and white striped background"."""
        if self.kind in world.SCENES:
            return world.SCENES[self.kind]
        if self.kind == "solid":
            return f"on {world.article(self.a)} {self.a} background"
        return f"on {world.article(self.a)} {self.a} and {self.b} {self.kind} background"


@dataclass(frozen=True)
class Scene:
    """Everything that the renderer needs; ``jitter`` seeds the free parts (place, clouds, turns)."""

    things: tuple[Thing, ...]
    ground: Ground
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
# Families hold many variants, so they get more of the pictures than one class in twenty-one.
_CLASS_DRAW = (*tuple(c for c in world.CLASS_WORDS if c not in world.FAMILIES), "monster", "monster", "mug", "robot")


def random_thing(rng: Random, tint: float = 0.14) -> tuple[Thing, str]:
    """A training object and the noun phrase for it without article, such as "blue dog"."""
    word = rng.choice(_CLASS_DRAW)
    if word in world.FAMILIES:
        variant, color = rng.choice(world.VARIANTS[word]), rng.choice(_COLORS)
        name = variant.name if rng.random() < 0.4 and not variant.name.startswith("plain") else word
        return Thing(variant, color), f"{color} {name}" if rng.random() < 0.8 else name
    sprite = rng.choice(_BY_CLASS[word])
    name = sprite if rng.random() < 0.5 else word
    if rng.random() < tint:
        color = rng.choice(_COLORS)
        return Thing(sprite, color), f"{color} {name}"
    return Thing(sprite), name


def random_ground(rng: Random, avoid: str | None = None) -> Ground:
    """A background: half scenes, a fifth plain colors (never ``avoid``, the object's), the rest patterns."""
    draw = rng.random()
    if draw < 0.55:
        return Ground(rng.choice(_SCENES))
    a = rng.choice([c for c in _COLORS if c != avoid])
    if draw < 0.78:
        return Ground("solid", a)
    b = rng.choice([c for c in _COLORS if c != a])
    return Ground(rng.choice(("striped", "checkered", "dotted")), a, b)


def rare_word(rng: Random) -> str:
    """A word without meaning: a listed one, or two to five random letters."""
    if rng.random() < 0.6:
        return rng.choice(world.RARE_WORDS)
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randrange(2, 6)))


def _with_article(phrase: str) -> str:
    return f"{world.article(phrase)} {phrase}"


def random_scene(seed: int, index: int) -> Scene:
    """The training scene of that seed and index; the same pair always gives the same scene."""
    rng = Random(seed * 1_000_003 + index)
    return scene_with(rng, *random_thing(rng))


def scene_pair(seed: int, index: int) -> tuple[Scene, Scene]:
    """Two scenes around one and the same object, often in an unusual color: what a judge of subjects learns from."""
    rng = Random(seed * 1_000_003 + index)
    thing, phrase = random_thing(rng, tint=0.5)
    return scene_with(rng, thing, phrase), scene_with(rng, thing, phrase)


def scene_with(rng: Random, thing: Thing, phrase: str) -> Scene:
    """A random scene around an object that captions call ``phrase``."""
    ground = random_ground(rng, avoid=thing.color)
    things: tuple[Thing, ...] = (thing,)
    size = position = accessory = ""
    tree = False
    draw = rng.random()
    if draw < 0.06:
        n = rng.choice((2, 2, 3))
        things = (thing,) * n
        color = phrase.split()[0] if phrase.split()[0] in world.COLORS else ""
        words = [world.NUMBERS[n], color, world.plural(thing.class_word)]
        text = " ".join(w for w in words if w)
    else:
        if draw < 0.15:
            size = rng.choice(("small", "small", "big"))
            phrase = f"{size} {phrase}"
        if rng.random() < 0.05:
            # only the last word is sure to be the class word, and a rare word must stand before that
            color = f"{thing.color} " if thing.color and rng.random() < 0.5 else ""
            phrase = f"{size} " * bool(size) + f"{rare_word(rng)} {color}{thing.class_word}"
        text = _with_article(phrase)
        if 0.15 <= draw < 0.31:
            accessory = rng.choice(world.ACCESSORIES)
            if accessory == "sunglasses" and not has_eyes(thing):
                accessory = "crown"
            text += " wearing " + (accessory if accessory == "sunglasses" else _with_article(accessory))
        elif 0.31 <= draw < 0.39:
            tree = True
            text += " next to a tree"
        elif 0.39 <= draw < 0.47:
            other, other_phrase = random_thing(rng, tint=0.1)
            things = (thing, other)
            text += f" next to {_with_article(other_phrase)}"
    text = f"{text} {ground.phrase}"
    if len(things) == 1 and not tree and rng.random() < 0.08:
        position = rng.choice(("left", "right"))
        text += f" {world.POSITIONS[position]}"
    if rng.random() < 0.08:
        text = f"{rng.choice(world.ARTISTIC)} {text}"
    return Scene(things, ground, text, rng.getrandbits(32), size, position, accessory, tree)


def has_eyes(thing: Thing) -> bool:
    """Whether glasses have a place on the object."""
    if isinstance(thing.sprite, Variant):
        return thing.sprite.family in ("monster", "robot")
    return any(e.name == thing.sprite and e.eyes for e in world.EMOJI)
