"""The vocabulary of the drawn world: classes, objects, colors, backgrounds, and what is held out.

Every class has at least three training objects beside the held-out one. So the base knows the class word, while no part
of it has ever seen the held-out object, which serves as a subject for adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any


@dataclass(frozen=True)
class Emoji:
    """One cut-out: sprite name (also its specific name in captions), code point and class word.

    ``head``: where a hat sits, in fractions of the cut-out's width and height (None: measured from the alpha channel).
    ``hat``: width of the hat as a fraction of the cut-out's width. ``eyes``: where glasses sit.
    """

    name: str
    char: str
    class_word: str
    heldout: bool = False
    head: tuple[float, float] | None = None
    hat: float = 0.6
    eyes: tuple[float, float] | None = None


def _members(class_word: str, *rows: tuple[Any, ...], heldout: str) -> list[Emoji]:
    """The cut-outs of a class, from rows of (name, char, head, hat, eyes) whose last three may be left out."""
    return [Emoji(name, char, class_word, name == heldout, *optional) for name, char, *optional in rows]


EMOJI: tuple[Emoji, ...] = tuple(
    _members(
        "dog",
        ("puppy", "🐶", (0.5, 0.08), 0.65, (0.5, 0.42)),
        ("wolf", "🐺", (0.5, 0.15), 0.6, (0.5, 0.48)),
        ("fox", "🦊", (0.5, 0.2), 0.6, (0.5, 0.52)),
        ("poodle", "🐩", (0.3, 0.05), 0.5),
        heldout="poodle",
    )
    + _members(
        "cat",
        ("kitten", "🐱", (0.5, 0.14), 0.6, (0.5, 0.45)),
        ("tabby", "🐈", (0.28, 0.08), 0.5),
        ("lion", "🦁", (0.5, 0.1), 0.6, (0.5, 0.4)),
        ("tiger", "🐯", (0.5, 0.08), 0.65, (0.5, 0.4)),
        heldout="tiger",
    )
    + _members(
        "bear",
        ("grizzly", "🐻", (0.5, 0.1), 0.65, (0.5, 0.42)),
        ("koala", "🐨", (0.5, 0.12), 0.55, (0.5, 0.45)),
        ("teddy", "🧸", (0.5, 0.06), 0.55, (0.5, 0.24)),
        ("panda", "🐼", (0.5, 0.08), 0.65, (0.5, 0.48)),
        heldout="panda",
    )
    + _members(
        "bird",
        ("penguin", "🐧", (0.45, 0.05), 0.6),
        ("chick", "🐤", (0.35, 0.05), 0.5),
        ("owl", "🦉", (0.5, 0.08), 0.7, (0.5, 0.27)),
        ("parrot", "🦜", (0.32, 0.05), 0.5),
        heldout="parrot",
    )
    + _members(
        "fish",
        ("herring", "🐟", (0.35, 0.15), 0.4),
        ("angelfish", "🐠", (0.4, 0.1), 0.45),
        ("whale", "🐋", (0.3, 0.3), 0.45),
        ("pufferfish", "🐡", (0.45, 0.1), 0.45),
        heldout="pufferfish",
    )
    + _members(
        "bug",
        ("ladybug", "🐞", (0.5, 0.1), 0.5),
        ("bee", "🐝", (0.3, 0.12), 0.45),
        ("caterpillar", "🐛", (0.3, 0.12), 0.45),
        ("beetle", "🪲", (0.5, 0.1), 0.5),
        heldout="beetle",
    )
    + _members(
        "reptile",
        ("turtle", "🐢", (0.2, 0.25), 0.4),
        ("crocodile", "🐊", (0.5, 0.08), 0.4),
        ("brontosaurus", "🦕", (0.3, 0.05), 0.4),
        ("tyrannosaurus", "🦖", (0.3, 0.06), 0.45),
        heldout="tyrannosaurus",
    )
    + _members("car", ("sedan", "🚗"), ("taxi", "🚕"), ("jeep", "🚙"), ("racer", "🏎"), heldout="racer")
    + _members("truck", ("van", "🚚"), ("firetruck", "🚒"), ("pickup", "🛻"), ("tractor", "🚜"), heldout="tractor")
    + _members("flower", ("rose", "🌹"), ("sunflower", "🌻"), ("tulip", "🌷"), ("hibiscus", "🌺"), heldout="hibiscus")
    + _members(
        "fruit", ("apple", "🍎"), ("lemon", "🍋"), ("strawberry", "🍓"), ("pineapple", "🍍"), heldout="pineapple"
    )
    + _members(
        "ball",
        ("soccerball", "⚽"),
        ("basketball", "🏀"),
        ("football", "🏈"),
        ("billiard", "🎱"),
        heldout="billiard",
    )
    + _members("shoe", ("sneaker", "👟"), ("heel", "👠"), ("boot", "👢"), ("skate", "🛼"), heldout="skate")
    + _members("cake", ("layercake", "🎂"), ("shortcake", "🍰"), ("donut", "🍩"), ("cupcake", "🧁"), heldout="cupcake")
    + _members("drink", ("beer", "🍺"), ("wine", "🍷"), ("milk", "🥛"), ("boba", "🧋"), heldout="boba")
    + _members("boat", ("sailboat", "⛵"), ("ship", "🚢"), ("ferry", "⛴"), ("speedboat", "🚤"), heldout="speedboat")
    + _members("house", ("cottage", "🏠"), ("church", "⛪"), ("school", "🏫"), ("castle", "🏰"), heldout="castle")
    + _members("bag", ("handbag", "👜"), ("purse", "👛"), ("briefcase", "💼"), ("backpack", "🎒"), heldout="backpack")
)
EMOJI_BY_NAME = {e.name: e for e in EMOJI}
PROPS: tuple[tuple[str, str], ...] = (  # more cut-outs: (name, code point)
    ("top hat", "🎩"),
    ("crown", "👑"),
    ("sunglasses", "🕶"),
    ("sun hat", "👒"),
    ("tree", "🌳"),
)
ACCESSORIES = ("top hat", "crown", "party hat", "sun hat", "sunglasses")
FAMILY_PARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    # (body, eyes, top, belly), (print, shape), (head, eyes, antenna, chest)
    "monster": (
        ("round", "square", "pear"),
        ("one-eyed", "two-eyed", "three-eyed"),
        ("horns", "antennae", "ears"),
        ("plain", "belly"),
    ),
    "mug": (("plain", "dotted", "striped", "heart"), ("tall", "wide")),
    "robot": (("box", "dome"), ("square-eyed", "round-eyed", "visor"), ("antenna", "bolts"), ("gauge", "buttons")),
}
FAMILIES = tuple(FAMILY_PARTS)
CLASS_WORDS: tuple[str, ...] = tuple(dict.fromkeys(e.class_word for e in EMOJI)) + FAMILIES
PLURALS = {"fish": "fish", "house": "houses"}

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 38, 44),
    "orange": (248, 142, 28),
    "yellow": (250, 214, 48),
    "green": (52, 166, 68),
    "blue": (44, 96, 222),
    "purple": (132, 60, 176),
    "pink": (250, 142, 192),
    "brown": (130, 82, 48),
    "black": (34, 34, 38),
    "white": (246, 246, 246),
}
SCENES: dict[str, str] = {  # kind of background -> its words in captions
    "snow": "in the snow",
    "beach": "on the beach",
    "road": "on the road",
    "forest": "in the forest",
    "sky": "in the sky",
    "sea": "in the sea",
    "night": "at night",
    "sunset": "at sunset",
    "desert": "in the desert",
    "table": "on a wooden table",
    "wall": "in front of a brick wall",
    "grass": "in the grass",
    "mountains": "in the mountains",
}
PATTERNS = ("solid", "striped", "checkered", "dotted")
RARE_WORDS = ("sks", "ohwx", "zwx", "qvb", "xjy", "vrk", "pbz", "wqo", "jkd", "ukj", "tqz", "olv")
ARTISTIC = ("a photo of", "a picture of", "an image of")
NUMBERS = {2: "two", 3: "three"}
POSITIONS = {"left": "on the left", "right": "on the right"}


@dataclass(frozen=True)
class Variant:
    """A member of a drawn family: one value for each part in ``FAMILY_PARTS``."""

    family: str
    parts: tuple[str, ...]

    @property
    def name(self) -> str:
        """Specific name in captions, such as "one-eyed monster": one of the parts and the class word."""
        adjective = {"monster": self.parts[1], "mug": self.parts[0], "robot": self.parts[1]}[self.family]
        return f"{adjective} {self.family}"


HELDOUT_VARIANTS: dict[str, Variant] = {
    "cyclops": Variant("monster", ("pear", "one-eyed", "horns", "belly")),
    "gremlin": Variant("monster", ("square", "three-eyed", "antennae", "plain")),
    "lovemug": Variant("mug", ("heart", "wide")),
    "stripemug": Variant("mug", ("striped", "tall")),
    "android": Variant("robot", ("dome", "visor", "antenna", "buttons")),
}
VARIANTS: dict[str, tuple[Variant, ...]] = {
    family: tuple(v for v in (Variant(family, p) for p in product(*axes)) if v not in HELDOUT_VARIANTS.values())
    for family, axes in FAMILY_PARTS.items()
}

# slug -> (object name, tint or None): the held-out subjects on which adapters are trained and scored.
SUBJECTS: dict[str, tuple[str, str | None]] = {
    **{e.name: (e.name, None) for e in EMOJI if e.heldout},
    "cyclops-purple": ("cyclops", "purple"),
    "cyclops-orange": ("cyclops", "orange"),
    "gremlin-green": ("gremlin", "green"),
    "lovemug-blue": ("lovemug", "blue"),
    "stripemug-red": ("stripemug", "red"),
    "android-pink": ("android", "pink"),
    "backpack-green": ("backpack", "green"),
}


def known_objects() -> list[str]:
    """The objects of the training images, as ``NAME: CLASS``; those of the families have a color."""
    colors = [name for name in COLORS if name not in ("black", "white")]
    drawn = [
        f"{colors[number % len(colors)]} {variant.name}: {family}"
        for family, variants in VARIANTS.items()
        for number, variant in enumerate({v.name: v for v in variants}.values())
    ]
    return [f"{emoji.name}: {emoji.class_word}" for emoji in training_emoji()] + drawn


def class_word_of(name: str) -> str:
    """Class word of an object name. Raises KeyError for an unknown name."""
    return HELDOUT_VARIANTS[name].family if name in HELDOUT_VARIANTS else EMOJI_BY_NAME[name].class_word


def training_emoji() -> tuple[Emoji, ...]:
    """The cut-outs that are not held out."""
    return tuple(e for e in EMOJI if not e.heldout)


def plural(word: str) -> str:
    """Plural of a class word."""
    return PLURALS.get(word, word + "s")


def with_article(phrase: str) -> str:
    """The phrase behind "a" or "an", by its first letter."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
