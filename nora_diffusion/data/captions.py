"""What each photo shows, in words: one prompt for all, a text file beside each, or a ``metadata.jsonl``."""

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
"""Words that are usual as triggers because no model knows them."""
METADATA = "metadata.jsonl"
COLUMN = "text"


def read_captions(
    photos: Sequence[Path], prompt: str | None, sidecars: bool = False, column: str | None = None
) -> list[str]:
    """One caption a photo: from ``column`` of ``metadata.jsonl``, or with ``sidecars`` from the ``.txt`` beside it,
    else from ``text`` of ``metadata.jsonl`` if there is one. One without its own gets ``prompt``.

    Raises :class:`UserError` without either.
    """
    if column:
        own = _from_metadata(photos[0].parent, column)
        source = f"a line in {METADATA}"
    elif sidecars:
        listed = _from_metadata(photos[0].parent, COLUMN) if (photos[0].parent / METADATA).is_file() else {}
        own = listed | {path.name: text for path in photos if (text := _from_sidecar(path))}
        source = "a .txt file"
    else:
        own, source = {}, ""
    if not own and not prompt:
        raise UserError("there is no prompt: give --instance_prompt 'a photo of sks dog', or captions (--use_captions)")
    if source and not own:
        log.warning("no photo has %s of its own: all go by the instance prompt '%s'", source, prompt)
    bare = [path.name for path in photos if path.name not in own]
    if bare and not prompt:
        raise UserError(f"{bare[0]} has no caption: add {source} for it, or give --instance_prompt for such photos")
    return [own.get(path.name, prompt or "") for path in photos]


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
        raise UserError(f"{path}, line {number} is not valid JSON: write one object a line") from error
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise UserError(f"{path}, line {number} has no 'file_name'")
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        others = ", ".join(key for key in row if key != "file_name")
        raise UserError(f"{path}, line {number} has no text under {column!r}; its keys are {others or 'none'}")
    return Path(row["file_name"]).name, " ".join(text.split())


def guess_trigger(prompt: str, class_word: str | None = None, class_prompt: str | None = None) -> str | None:
    """The word of ``prompt`` that names the subject: what the class's words and filler words leave over.

    ``"a photo of sks dog"`` gives ``"sks"``; with one such word, as in ``"a photo of a dog"``, ``None``. A word
    that nobody says is taken before any other.
    """
    words = [word for word in _words(prompt) if word.lower() not in FILLERS]
    ordinary = {word.lower() for word in _words(f"{class_word or ''} {class_prompt or ''}")}
    left = [word for word in words if word.lower() not in ordinary]
    if made_up := [word for word in left if _is_made_up(word)]:
        return made_up[0]
    if not ordinary and len(left) > 1:  # "a professional photo of bobo dog": what it is a photo of
        named = [word for word in _words(re.split(r"\bof\b", prompt)[-1]) if word in left]
        return named[0] if len(named) > 1 else left[0]
    return left[0] if left and ordinary else None


def _is_made_up(word: str) -> bool:
    """Whether a word is one of the usual triggers, or none that anybody would say: ``tqz``, ``tok3``."""
    unspoken = len(word) > 2 and word.isascii() and not re.search("[aeiouy]", word, re.IGNORECASE)
    return word.lower() in TRIGGERS or unspoken or any(sign.isdigit() for sign in word)


def guess_class_word(prompt: str, trigger: str | None) -> str | None:
    """The content words right after the trigger: ``"sks toy dog on a beach"`` gives ``"toy dog"``."""
    words = _words(prompt)
    if trigger is None or trigger not in words:
        return None
    following = _words(re.split(word_pattern(trigger), prompt, maxsplit=1)[-1].split(",")[0])
    stop = next((i for i, word in enumerate(following) if word.lower() in FILLERS), len(following))
    return " ".join(following[:stop]) or None


def word_pattern(word: str) -> str:
    """The pattern of ``word`` where it is no part of a longer one."""
    return rf"(?<!\w){re.escape(word)}(?!\w)"


def has_word(prompt: str, word: str) -> bool:
    """Whether ``word`` stands in ``prompt``, as a word and in any case."""
    return re.search(word_pattern(word), prompt, re.IGNORECASE) is not None


def with_trigger(caption: str, trigger: str | None, class_word: str | None) -> str:
    """The caption with the trigger in it: before the class word where that stands, else in front."""
    if not trigger or re.search(word_pattern(trigger), caption):
        return caption
    if class_word:
        if has_word(caption, class_word):
            named = re.compile(word_pattern(class_word), re.IGNORECASE)
            return named.sub(lambda found: f"{trigger} {found[0]}", caption, count=1)
        return f"{trigger} {class_word}, {caption}"
    return f"{trigger}, {caption}"


def fill(template: str, phrase: str) -> str:
    """A prompt: ``{}`` stands for the subject ("a sks dog"), ``{noun}`` for it without its article."""
    noun = phrase.partition(" ")[2] if phrase.split(" ")[0].lower() in ("a", "an", "the") else phrase
    return template.replace("{}", phrase).replace("{noun}", noun)


def with_article(words: str) -> str:
    """``a dog``, ``an owl``."""
    return f"{'an' if words[:1].lower() in tuple('aeiou') else 'a'} {words}"


def without_trigger(prompt: str, trigger: str | None) -> str:
    """The prompt as judges, who do not know the trigger, get it."""
    return re.sub(word_pattern(trigger) + r"\s*", "", prompt) if trigger else prompt


def _words(text: str) -> list[str]:
    return re.findall(r"[\w<>\-*']+", text)
