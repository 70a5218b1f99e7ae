"""Trigger word and class word in prompts and captions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import permutations

FILLERS = frozenset({
    "a", "an", "the", "of", "in", "on", "at", "with", "and", "my", "our", "one", "good", "bad", "nice", "close", "up",
    "closeup", "photo", "photograph", "picture", "image", "portrait", "drawing", "painting", "rendering", "rendition",
    "selfie", "wearing", "holding", "sitting", "standing", "lying", "running", "walking", "playing",
})  # fmt: skip
TRIGGERS = (
    "sks", "ohwx", "zwx", "qvb", "xjy", "vrk", "pbz", "wqo", "jkd", "ukj", "tqz", "olv", "zqx", "qxzvj",
)  # fmt: skip
"""Words commonly used as triggers because they mean nothing to a model."""
CONSONANTS = "zqxvjkwpbg"


def triggers() -> Iterator[str]:
    """:data:`TRIGGERS`, then more words of that kind, each once."""
    yield from TRIGGERS
    made = ("".join(letters) for letters in permutations(CONSONANTS, 3))
    yield from (word for word in made if word not in TRIGGERS)


def guess_trigger(prompt: str, class_word: str | None = None, class_prompt: str | None = None) -> str | None:
    """Guess the trigger word of ``prompt``: a word that is neither a filler nor part of the class.

    ``"a photo of sks dog"`` gives ``"sks"``. A single such word, as in ``"a photo of a dog"``, gives ``None`` without a
    class. Made-up words come first.
    """
    words = [word for word in _words(prompt) if word.lower() not in FILLERS]
    class_words = {word.lower() for word in _words(f"{class_word or ''} {class_prompt or ''}")}
    candidates = [word for word in words if word.lower() not in class_words]
    if made_up := [word for word in candidates if _is_made_up(word)]:
        return made_up[0]
    if not class_words and len(candidates) > 1:  # "a professional photo of bobo dog": prefer words after "of"
        after_of = [word for word in _words(re.split(r"\bof\b", prompt)[-1]) if word in candidates]
        return after_of[0] if len(after_of) > 1 else candidates[0]
    return candidates[0] if candidates and class_words else None


def _is_made_up(word: str) -> bool:
    """Whether a word is a common trigger, is ``<dog>``, has no vowel (``tqz``) or has a digit (``tok3``)."""
    no_vowel = len(word) > 2 and word.isascii() and not re.search("[aeiouy]", word, re.IGNORECASE)
    return (
        word.lower() in TRIGGERS or word.startswith("<") or no_vowel or any(character.isdigit() for character in word)
    )


def word_pattern(word: str) -> str:
    """A regular expression for ``word`` as a whole word."""
    return rf"(?<!\w){re.escape(word)}(?!\w)"


def has_word(prompt: str, word: str) -> bool:
    """Whether ``prompt`` contains ``word`` as a whole word, ignoring case."""
    return re.search(word_pattern(word), prompt, re.IGNORECASE) is not None


def with_trigger(caption: str, trigger: str | None, class_word: str | None) -> str:
    """The caption with the trigger: inserted before the class word if it has that, else prepended."""
    if not trigger or re.search(word_pattern(trigger), caption):
        return caption
    if class_word:
        if has_word(caption, class_word):
            named = re.compile(word_pattern(class_word), re.IGNORECASE)
            return named.sub(lambda found: f"{trigger} {found[0]}", caption, count=1)
        return f"{trigger} {class_word}, {caption}"
    return f"{trigger}, {caption}"


def fill(template: str, phrase: str) -> str:
    """Fill in a prompt template: ``{}`` is the phrase ("a sks dog"), ``{noun}`` the phrase without its article."""
    noun = phrase.partition(" ")[2] if phrase.split(" ")[0].lower() in ("a", "an", "the") else phrase
    return template.replace("{}", phrase).replace("{noun}", noun)


def with_article(words: str) -> str:
    """``a dog``, ``an owl``."""
    return f"{'an' if words[:1].lower() in tuple('aeiou') else 'a'} {words}"


def without_trigger(prompt: str, trigger: str | None) -> str:
    """The prompt without the trigger, which a judge does not know."""
    return re.sub(word_pattern(trigger) + r"\s*", "", prompt) if trigger else prompt


def _words(text: str) -> list[str]:
    return re.findall(r"[\w<>\-*']+", text)
