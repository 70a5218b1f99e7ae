"""Objects that a base knows by name, from which it draws pseudo-subjects. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ...errors import UserError
from ...io.files import read_text
from ...io.untrusted import require_text

COMMON = (
    "golden retriever: dog", "dalmatian: dog", "pug: dog", "siamese cat", "ginger cat", "tiger", "panda", "koala",
    "elephant", "zebra", "penguin: bird", "flamingo: bird", "macaw: bird", "owl: bird", "goldfish: fish", "ladybug",
    "sea turtle", "rubber duck: toy", "teddy bear: toy", "toy robot", "lego castle: toy", "red sports car",
    "yellow taxi: car", "vintage bus", "steam locomotive", "sailboat: boat", "hot air balloon", "bicycle",
    "red backpack", "leather boot", "white sneaker", "sunglasses", "straw hat", "blue teapot", "striped mug",
    "glass vase", "alarm clock", "table lamp", "wooden chair", "acoustic guitar", "grand piano", "camera",
    "sunflower: flower", "red rose: flower", "cactus: plant", "pineapple: fruit", "strawberry cake", "cheeseburger",
    "lighthouse: building", "windmill: building",
)  # fmt: skip
"""Objects that most bases draw alike each time; the class word follows the colon, else it is the last word."""
PLACES = ("in the snow", "on the beach", "in the grass", "on a wooden table", "in the forest", "at night")


@dataclass(frozen=True)
class KnownObject:
    """An object that the base knows: its phrase, such as ``golden retriever``, and its class word, ``dog``."""

    phrase: str
    class_word: str

    @classmethod
    def parse(cls, line: str) -> KnownObject:
        """From ``PHRASE: CLASS`` or ``PHRASE``, whose last word is the class. Raises :class:`UserError`."""
        require_text(line, "an object")
        phrase, _, word = (part.strip() for part in line.partition(":"))
        word = word or phrase.split()[-1] if phrase else ""
        if not word or len(word.split()) > 1 or len(line) > 200:
            raise UserError(f"{line[:80]!r} is not an object: write its name, or NAME: CLASS with one class word")
        return cls(phrase, word)

    @property
    def slug(self) -> str:
        """The phrase as a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.phrase.lower()).strip("-") or "object"


def read_objects(file: str | Path) -> list[KnownObject]:
    """One object a line; empty lines are left out. Raises :class:`UserError`."""
    try:
        lines = read_text(Path(file).expanduser()).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as a list of objects: write one in each line, in UTF-8") from error
    return parse_objects([line for line in lines if line.strip()], str(file))


def parse_objects(lines: Sequence[str], source: str) -> list[KnownObject]:
    """Raises :class:`UserError` if there is none."""
    objects = list(dict.fromkeys(KnownObject.parse(line.strip()) for line in lines))
    if not objects:
        raise UserError(f"{source} has no objects: write one in each line, such as 'golden retriever: dog'")
    return objects


def drawn_by_lot(objects: Sequence[KnownObject], count: int, seed: int) -> list[KnownObject]:
    """``count`` of the objects in random order, each once before one comes again; more of them begin with the same."""
    rng, chosen = Random(seed), list[KnownObject]()
    while len(chosen) < count:
        chosen += rng.sample(objects, len(objects))
    return chosen[:count]
