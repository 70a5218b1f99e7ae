"""The words of prompts: which say what is in the image, and which of them are about what is around the subject."""

from __future__ import annotations

import re
from typing import NamedTuple

from ...data.captions import FILLERS

PART = re.compile(r"(?P<word>[^\W_][\w'-]*)|[,.;:|()\[\]]")
"""A word, or what ends a phrase."""
SETTING = frozenset({
    "in", "on", "at", "by", "near", "behind", "beside", "under", "above", "over", "against", "before", "beyond", "from",
    "inside", "outside", "between", "among", "next", "front", "with", "wearing", "holding", "during",
})  # fmt: skip
"""Words that begin a phrase about what is around the subject: "in the snow", "wearing a hat"."""
QUIET = FILLERS | SETTING | frozenset({
    "to", "for", "or", "as", "it", "its", "his", "her", "their", "your", "is", "are", "be", "this", "that", "these",
    "those", "some", "very", "which", "who", "while",
})  # fmt: skip
"""Words that say nothing about the image."""
JOINING = frozenset({"and", "or"})
SETTING_WEIGHT = 0.5


class Phrase(NamedTuple):
    """Successive words of a text, and their weight: 1 for a subject, 0.5 for what is around it."""

    words: tuple[str, ...]
    weight: float

    @property
    def text(self) -> str:
        """The phrase as text."""
        return " ".join(self.words)

    @property
    def content(self) -> list[str]:
        """Its words that say what is in the image: no articles, prepositions or "photo"."""
        return [word for word in self.words if is_content(word)]


def phrases(text: str) -> list[Phrase]:
    """A text, cut at punctuation, at "and", and before words like "in" or "wearing", which are about the setting.

    ``"a red mug and a cat in the snow"`` gives ``a red mug``, ``and a cat`` and ``in the snow``, the last with the
    weight 0.5.
    """
    found, words, weight = list[Phrase](), list[str](), 1.0
    for part in PART.finditer(text):
        word = part["word"]
        starts = word is None or word.lower() in SETTING | JOINING
        if starts and words:
            found.append(Phrase(tuple(words), weight))
            words = []
        if word is None:
            weight = 1.0
            continue
        weight = SETTING_WEIGHT if word.lower() in SETTING else weight
        words.append(word)
    return [*found, Phrase(tuple(words), weight)] if words else found


def is_content(word: str) -> bool:
    """Whether a word says what is in the image."""
    return word.lower() not in QUIET


def has_content(text: str) -> bool:
    """Whether any word of a text does."""
    return any(phrase.content for phrase in phrases(text))
