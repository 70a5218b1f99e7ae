"""The vocabulary of the drawn world: classes, objects, colors, scenes, and what is held out.

Every class keeps at least three training objects beside the one held out, so that a class word is a real
class for the base while the held-out object (a future subject) was never seen by any part of it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Emoji:
    """One cut-out: sprite name, the code point it is drawn from, and the specific name used in captions.

    ``head`` is where a hat sits, as fractions of the cut-out's width and height (None: measured from the
    alpha channel), ``hat`` the hat's width as a fraction of the cut-out's, ``eyes`` where glasses sit.
    """

    name: str
    char: str
    class_word: str
    heldout: bool = False
    head: tuple[float, float] | None = None
    hat: float = 0.6
    eyes: tuple[float, float] | None = None


def _emoji(class_word: str, *rows: Emoji | tuple[str, str], heldout: tuple[str, ...] = ()) -> list[Emoji]:
    out = []
    for row in rows:
        e = row if isinstance(row, Emoji) else Emoji(row[0], row[1], class_word)
        out.append(Emoji(e.name, e.char, class_word, e.name in heldout, e.head, e.hat, e.eyes))
    return out


def _e(
    name: str,
    char: str,
    head: tuple[float, float] | None = None,
    hat: float = 0.6,
    eyes: tuple[float, float] | None = None,
) -> Emoji:
    return Emoji(name, char, "", False, head, hat, eyes)


EMOJI: tuple[Emoji, ...] = tuple(
    _emoji(
        "dog",
        _e("puppy", "🐶", (0.5, 0.08), 0.65, (0.5, 0.42)),
        _e("wolf", "🐺", (0.5, 0.15), 0.6, (0.5, 0.48)),
        _e("fox", "🦊", (0.5, 0.2), 0.6, (0.5, 0.52)),
        _e("poodle", "🐩", (0.3, 0.05), 0.5),
        heldout=("poodle",),
    )
    + _emoji(
        "cat",
        _e("kitten", "🐱", (0.5, 0.14), 0.6, (0.5, 0.45)),
        _e("tabby", "🐈", (0.28, 0.08), 0.5),
        _e("lion", "🦁", (0.5, 0.1), 0.6, (0.5, 0.4)),
        _e("tiger", "🐯", (0.5, 0.08), 0.65, (0.5, 0.4)),
        heldout=("tiger",),
    )
    + _emoji(
        "bear",
        _e("grizzly", "🐻", (0.5, 0.1), 0.65, (0.5, 0.42)),
        _e("koala", "🐨", (0.5, 0.12), 0.55, (0.5, 0.45)),
        _e("teddy", "🧸", (0.5, 0.06), 0.55, (0.5, 0.24)),
        _e("panda", "🐼", (0.5, 0.08), 0.65, (0.5, 0.48)),
        heldout=("panda",),
    )
    + _emoji(
        "bird",
        _e("penguin", "🐧", (0.45, 0.05), 0.6),
        _e("chick", "🐤", (0.35, 0.05), 0.5),
        _e("owl", "🦉", (0.5, 0.08), 0.7, (0.5, 0.27)),
        _e("parrot", "🦜", (0.32, 0.05), 0.5),
        heldout=("parrot",),
    )
    + _emoji(
        "fish",
        _e("herring", "🐟", (0.35, 0.15), 0.4),
        _e("angelfish", "🐠", (0.4, 0.1), 0.45),
        _e("whale", "🐋", (0.3, 0.3), 0.45),
        _e("pufferfish", "🐡", (0.45, 0.1), 0.45),
        heldout=("pufferfish",),
    )
    + _emoji(
        "bug",
        _e("ladybug", "🐞", (0.5, 0.1), 0.5),
        _e("bee", "🐝", (0.3, 0.12), 0.45),
        _e("caterpillar", "🐛", (0.3, 0.12), 0.45),
        _e("beetle", "🪲", (0.5, 0.1), 0.5),
        heldout=("beetle",),
    )
    + _emoji(
        "reptile",
        _e("turtle", "🐢", (0.2, 0.25), 0.4),
        _e("crocodile", "🐊", (0.5, 0.08), 0.4),
        _e("brontosaurus", "🦕", (0.3, 0.05), 0.4),
        _e("tyrannosaurus", "🦖", (0.3, 0.06), 0.45),
        heldout=("tyrannosaurus",),
    )
    + _emoji("car", ("sedan", "🚗"), ("taxi", "🚕"), ("jeep", "🚙"), ("racer", "🏎"), heldout=("racer",))
    + _emoji("truck", ("van", "🚚"), ("firetruck", "🚒"), ("pickup", "🛻"), ("tractor", "🚜"), heldout=("tractor",))
    + _emoji("flower", ("rose", "🌹"), ("sunflower", "🌻"), ("tulip", "🌷"), ("hibiscus", "🌺"), heldout=("hibiscus",))
    + _emoji(
        "fruit", ("apple", "🍎"), ("lemon", "🍋"), ("strawberry", "🍓"), ("pineapple", "🍍"), heldout=("pineapple",)
    )
    + _emoji(
        "ball",
        ("soccerball", "⚽"),
        ("basketball", "🏀"),
        ("football", "🏈"),
        ("billiard", "🎱"),
        heldout=("billiard",),
    )
    + _emoji("shoe", ("sneaker", "👟"), ("heel", "👠"), ("boot", "👢"), ("skate", "🛼"), heldout=("skate",))
    + _emoji("cake", ("layercake", "🎂"), ("shortcake", "🍰"), ("donut", "🍩"), ("cupcake", "🧁"), heldout=("cupcake",))
    + _emoji("drink", ("beer", "🍺"), ("wine", "🍷"), ("milk", "🥛"), ("boba", "🧋"), heldout=("boba",))
    + _emoji("boat", ("sailboat", "⛵"), ("ship", "🚢"), ("ferry", "⛴"), ("speedboat", "🚤"), heldout=("speedboat",))
    + _emoji("house", ("cottage", "🏠"), ("church", "⛪"), ("school", "🏫"), ("castle", "🏰"), heldout=("castle",))
    + _emoji("bag", ("handbag", "👜"), ("purse", "👛"), ("briefcase", "💼"), ("backpack", "🎒"), heldout=("backpack",))
)
PROPS: tuple[tuple[str, str], ...] = (
    ("top hat", "🎩"),
    ("crown", "👑"),
    ("sunglasses", "🕶"),
    ("sun hat", "👒"),
    ("tree", "🌳"),
)
ACCESSORIES = ("top hat", "crown", "party hat", "sun hat", "sunglasses")
FAMILIES = ("monster", "mug", "robot")
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
SCENES: dict[str, str] = {
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
    """A member of a drawn family: its parts and the specific name they give it."""

    family: str
    parts: tuple[str, ...]

    @property
    def name(self) -> str:
        """Caption name such as "one-eyed monster": an adjective the parts deserve, and the class word."""
        adjective = {"monster": self.parts[1], "mug": self.parts[0], "robot": self.parts[1]}[self.family]
        return f"{adjective} {self.family}"


_SHAPES: dict[str, tuple[tuple[str, ...], ...]] = {
    # (body, eyes, top, belly), (print, shape), (head, eyes, antenna)
    "monster": (
        ("round", "square", "pear"),
        ("one-eyed", "two-eyed", "three-eyed"),
        ("horns", "antennae", "ears"),
        ("plain", "belly"),
    ),
    "mug": (("plain", "dotted", "striped", "heart"), ("tall", "wide")),
    "robot": (("box", "dome"), ("square-eyed", "round-eyed", "visor"), ("antenna", "bolts"), ("gauge", "buttons")),
}


def _product(axes: tuple[tuple[str, ...], ...]) -> list[tuple[str, ...]]:
    out: list[tuple[str, ...]] = [()]
    for axis in axes:
        out = [(*row, value) for row in out for value in axis]
    return out


HELDOUT_VARIANTS: dict[str, Variant] = {
    "cyclops": Variant("monster", ("pear", "one-eyed", "horns", "belly")),
    "gremlin": Variant("monster", ("square", "three-eyed", "antennae", "plain")),
    "lovemug": Variant("mug", ("heart", "wide")),
    "stripemug": Variant("mug", ("striped", "tall")),
    "android": Variant("robot", ("dome", "visor", "antenna", "buttons")),
}
VARIANTS: dict[str, tuple[Variant, ...]] = {
    family: tuple(v for v in (Variant(family, p) for p in _product(axes)) if v not in HELDOUT_VARIANTS.values())
    for family, axes in _SHAPES.items()
}

# slug -> (object name, tint or None): the subjects on which adapters are shown and judged.
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


def class_word_of(name: str) -> str:
    """Class word of an object name; raises KeyError for a name that the world does not have."""
    if name in HELDOUT_VARIANTS:
        return HELDOUT_VARIANTS[name].family
    return {e.name: e.class_word for e in EMOJI}[name]


def training_emoji() -> tuple[Emoji, ...]:
    """The cut-outs that may appear in training scenes."""
    return tuple(e for e in EMOJI if not e.heldout)


def plural(word: str) -> str:
    """Plural of a class word."""
    return PLURALS.get(word, word + "s")


def article(word: str) -> str:
    """ "a" or "an", by the first letter of the next word."""
    return "an" if word[0] in "aeiou" else "a"
