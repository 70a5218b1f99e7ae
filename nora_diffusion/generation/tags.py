"""``<lora:name:0.8>`` tags in prompts: read, write and remove them. No other module knows their syntax.

The forms are those of AUTOMATIC1111's web UI: ``<lora:name>`` (weight 1), ``<lora:name:0.8>`` (both),
``<lora:name:0.6:0.8>`` (text encoders, then denoiser), and named weights in any order:
``<lora:name:unet=0.8:te=0.6>``. A named weight overrides a positional one; the denoiser's weight defaults to that of
the text encoders. Tags are written with named weights if the two differ.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..adapters.axes import MAX_WEIGHT
from ..errors import UserError

MAX_QUOTED = 200
"""Characters of a tag that an error quotes."""
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
TAG = re.compile(r"<\s*lora\s*:[^<>]*>", re.IGNORECASE)
SPACED = re.compile(rf"(?P<blank> ?)(?P<tag>{TAG.pattern})", re.IGNORECASE)
BROKEN = re.compile(r"<\s*lora\b[^<>\n]{0,60}>?", re.IGNORECASE)
FORBIDDEN = re.compile(r"[<>:\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Tag:
    """An adapter's name and its weights on the denoiser (``unet``) and on the text encoders (``te``)."""

    name: str
    unet: float = 1.0
    te: float = 1.0

    def __post_init__(self) -> None:
        if not self.name or self.name != self.name.strip() or FORBIDDEN.search(self.name):
            raise UserError(f"the adapter name {self.name[:80]!r} is not valid in a tag: write <lora:name:0.8>")
        for weight in (self.unet, self.te):
            check_range(weight, f"the tag of {self.name[:80]!r}")

    def __str__(self) -> str:
        if self.unet == self.te:
            return f"<lora:{self.name}:{short_number(self.unet)}>"
        return f"<lora:{self.name}:unet={short_number(self.unet)}:te={short_number(self.te)}>"


def parse_tags(prompt: str) -> tuple[str, list[Tag]]:
    """The prompt without its tags, and the tags in order.

    Raises :class:`UserError`, quoting the tag, for a weight that is not a number or out of range, an unknown named
    weight, a missing name, an adapter named twice or a tag that is not closed.
    """
    tags = [_parse(match[0]) for match in TAG.finditer(prompt)]
    clean = _replace(prompt, lambda tag: "")
    if broken := BROKEN.search(clean):
        raise UserError(f"{broken[0]!r} in the prompt is not a complete tag: write <lora:name:0.8>")
    for name, count in Counter(tag.name for tag in tags).items():
        if count > 1:
            raise UserError(f"the prompt names the adapter {name[:80]!r} twice: write one tag with the weight you mean")
    return clean, tags


def write_tags(prompt: str, tags: Sequence[Tag]) -> str:
    """``prompt`` with exactly these tags: existing ones keep their position, new ones are appended.

    ``parse_tags(write_tags(p, tags)) == (p, tags)`` for every prompt ``p`` without tags and tags with distinct names.
    """
    new = {tag.name: str(tag) for tag in tags}
    if len(new) < len(tags):
        raise UserError("two tags have the same adapter name: keep one")
    old = {tag.name for tag in parse_tags(prompt)[1]}
    updated = _replace(prompt, lambda tag: new.get(tag.name, ""))
    added = [text for name, text in new.items() if name not in old]
    return " ".join([updated, *added] if updated else added)


def tag_name(text: str) -> str:
    """``text`` as a valid name for a tag; other characters become ``_``."""
    return FORBIDDEN.sub("_", text).strip() or "_"


def parse_weight(text: str, where: str) -> float:
    """A weight from a prompt or a command line. Raises :class:`UserError`, naming ``where`` it comes from."""
    if not NUMBER.fullmatch(text.strip()):
        raise UserError(f"the weight {text.strip()[:40]!r} in {where} is not a number: write for example 0.8")
    return check_range(float(text), where)


def check_range(weight: float, where: str) -> float:
    """Return ``weight``. Raises :class:`UserError` if it is not finite or its size exceeds :data:`MAX_WEIGHT`."""
    if not math.isfinite(weight) or abs(weight) > MAX_WEIGHT:
        raise UserError(f"the weight {weight:g} in {where} is out of range: choose -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
    return weight


def _parse(text: str) -> Tag:
    fields = [field.strip() for field in text.strip("<>").split(":")[1:]]
    text = text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}…"
    name, numbers, named = fields[0], list[float](), dict[str, float]()
    for field in fields[1:]:
        key, equals, value = field.partition("=")
        if not equals:
            numbers.append(parse_weight(field, text))
        elif key.strip() not in ("unet", "te") or key.strip() in named:
            raise UserError(
                f"{field[:40]!r} in {text} is unknown or repeated: name each weight once, as unet=0.8 or te=0.6"
            )
        else:
            named[key.strip()] = parse_weight(value, text)
    if not name or len(numbers) > 2:
        raise UserError(f"{text} is not a valid tag: write <lora:name:0.8> or <lora:name:unet=0.8:te=0.6>")
    te = named.get("te", numbers[0] if numbers else 1.0)
    return Tag(name, named.get("unet", numbers[1] if len(numbers) > 1 else te), te)


def _replace(prompt: str, text_for: Callable[[Tag], str]) -> str:
    """Replace every tag by ``text_for(tag)``.

    A removed tag takes one adjacent space with it, but the words on its two sides stay separate.
    """

    def replaced(match: re.Match[str]) -> str:
        text = text_for(_parse(match["tag"]))
        if text:
            return match["blank"] + text
        start, end = match.span()  # no slices of the prompt: with many tags they would take quadratic time
        between = start > 0 and end < len(prompt) and " " not in (prompt[start - 1], prompt[end])
        joins = between and not TAG.match(prompt, end)
        inside = prompt.rfind("<", 0, start) > prompt.rfind(">", 0, start)  # an unclosed tag must stay recognizable
        return " " if joins and not inside else ""

    result = SPACED.sub(replaced, prompt)
    return result.removeprefix(" ") if TAG.match(prompt) else result


def short_number(value: float) -> str:
    """The shortest text that parses to the same number."""
    return repr(float(value)).removesuffix(".0")
