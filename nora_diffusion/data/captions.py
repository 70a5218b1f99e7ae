"""Captions of images (one prompt for all, ``.txt`` files or ``metadata.jsonl``), trigger and class words in prompts."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError

log = logging.getLogger(__name__)

FILLERS = frozenset({
    "a", "an", "the", "of", "in", "on", "at", "with", "and", "my", "our", "one", "good", "bad", "nice", "close", "up",
    "closeup", "photo", "photograph", "picture", "image", "portrait", "drawing", "painting", "rendering", "rendition",
    "selfie", "wearing", "holding", "sitting", "standing", "lying", "running", "walking", "playing",
})  # fmt: skip
TRIGGERS = ("sks", "ohwx", "zqx", "qxzvj")
"""Words commonly used as triggers because they mean nothing to a model."""
METADATA = "metadata.jsonl"
COLUMN = "text"


def read_captions(
    images: Sequence[Path], prompt: str | None, sidecars: bool = False, column: str | None = None
) -> list[str]:
    """One caption per image file: from ``column`` of ``metadata.jsonl``; or with ``sidecars`` from the ``.txt`` of the
    same name, else from ``text`` of ``metadata.jsonl``. Images without a caption get ``prompt``.

    Raises :class:`UserError` if an image has neither.
    """
    folder = images[0].parent
    if column:
        own = _from_metadata(folder, column)
        source = f"a line in {METADATA}"
    elif sidecars:
        rows = _from_metadata(folder, COLUMN) if (folder / METADATA).is_file() else {}
        own = rows | {path.name: text for path in images if (text := _from_sidecar(path))}
        source = "a .txt file"
    else:
        own, source = {}, ""
    if not own and not prompt:
        raise UserError("there is no prompt: give --instance_prompt 'a photo of sks dog', or captions (--use_captions)")
    if source and not own:
        log.warning("no photo has %s: all get the instance prompt '%s' as caption", source, prompt)
    missing = [path.name for path in images if path.name not in own]
    if missing and not prompt:
        raise UserError(f"{missing[0]} has no caption: add {source} for it, or give --instance_prompt for such photos")
    return [own.get(path.name, prompt or "") for path in images]


def _from_sidecar(path: Path) -> str:
    sidecar = path.with_suffix(".txt")
    if not sidecar.is_file():
        return ""
    try:
        return " ".join(sidecar.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the caption {sidecar} cannot be read: save it as UTF-8 text") from error


def _from_metadata(folder: Path, column: str) -> dict[str, str]:
    path = folder / METADATA
    if not path.is_file():
        raise UserError(f'--caption_column needs {path}, with lines like {{"file_name": "0.jpg", {column!r}: ...}}')
    captions = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: save it as UTF-8 text") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            name, text = _metadata_row(path, number, line, column)
            captions[name] = text
    return captions


def _metadata_row(path: Path, number: int, line: str, column: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number} is not valid JSON: write one object per line") from error
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise UserError(f"{path}, line {number} has no 'file_name'")
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        others = ", ".join(key for key in row if key != "file_name")
        raise UserError(f"{path}, line {number} has no text under {column!r}; its keys are {others or 'none'}")
    return Path(row["file_name"]).name, " ".join(text.split())


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
    """Whether a word is a common trigger, has no vowel (``tqz``) or has a digit (``tok3``)."""
    no_vowel = len(word) > 2 and word.isascii() and not re.search("[aeiouy]", word, re.IGNORECASE)
    return word.lower() in TRIGGERS or no_vowel or any(character.isdigit() for character in word)


def guess_class_word(prompt: str, trigger: str | None) -> str | None:
    """The words between the trigger and the next filler: ``"sks toy dog on a beach"`` gives ``"toy dog"``."""
    words = _words(prompt)
    if trigger is None or trigger not in words:
        return None
    following = _words(re.split(word_pattern(trigger), prompt, maxsplit=1)[-1].split(",")[0])
    stop = next((i for i, word in enumerate(following) if word.lower() in FILLERS), len(following))
    return " ".join(following[:stop]) or None


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
