"""Untrusted values: bounded JSON, type checks, text without control characters."""

from __future__ import annotations

import json
import re
import types
import unicodedata
from typing import Any, Literal, Union, get_args, get_origin

from ..errors import UserError

MAX_VALUES = 100_000
MAX_TEXT = 10_000
MAX_ITEMS = 20_000
MAX_DEPTH = 8
UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories that a terminal or browser may interpret: control and format characters, surrogates,
separators of lines and paragraphs."""
JOINERS = "\u200c\u200d"
"""Format characters that some scripts and emoji need."""
NOT_TEXT = re.compile("[\0\ud800-\udfff]")
"""NUL and lone surrogates, which no file can hold as text."""


def require_text(text: str, name: str) -> None:
    """Raise :class:`UserError` for a NUL or a lone surrogate: half of an emoji, or a byte that is not UTF-8."""
    if odd := NOT_TEXT.search(text):
        raise UserError(f"{name} has the character {odd[0]!a}, which is not text: remove it")


def is_plain(text: str) -> bool:
    """Whether ``text`` is printable ASCII."""
    return text.isascii() and text.isprintable()


def clean(text: str) -> str:
    """Replace line breaks and tabs with spaces; remove the characters in :data:`UNPRINTABLE`."""
    if is_plain(text):
        return text
    spaced = "".join(" " if char in "\n\r\t" else char for char in text)
    return "".join(c for c in spaced if c in JOINERS or unicodedata.category(c) not in UNPRINTABLE)


def parse_json(text: str | bytes | bytearray, max_values: int = MAX_VALUES) -> Any:
    """Parse UTF-8 JSON. Raises ``ValueError`` for more than ``max_values`` values, a repeated key, NaN, deep nesting.

    Values are counted by their separators before parsing, because ``[[],[],...`` takes twenty times its size in
    memory.
    """
    text = text if isinstance(text, str) else text.decode()
    if sum(text.count(separator) for separator in ",{[") > max_values:
        raise ValueError(f"more than {max_values:,} values")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def conform(value: Any, hint: Any, name: str, largest: float) -> Any:
    """Return ``value`` with its text cleaned. Raises ``ValueError`` with ``name`` if it is not of the type ``hint``.

    Numbers must be finite and at most ``largest`` in magnitude, strings at most 10,000 characters long, lists and
    dicts at most 20,000 items.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value in args and isinstance(value, str):
            return value
    elif origin in (Union, types.UnionType):
        return _one_of(value, args, name, largest)
    elif origin is list and isinstance(value, list | tuple) and len(value) <= MAX_ITEMS:
        return [conform(item, args[0], f"an item of {name}", largest) for item in value]
    elif origin is dict and isinstance(value, dict) and len(value) <= MAX_ITEMS:
        if not all(isinstance(key, str) and len(key) <= MAX_TEXT for key in value):
            raise ValueError(f"{name} has a key that is too long")
        return {clean(key): conform(item, args[1], f"an entry of {name}", largest) for key, item in value.items()}
    elif hint is Any:
        return _anything(value, name, largest, MAX_DEPTH)
    elif _is_simple(value, hint, largest):
        return clean(value) if hint is str else hint(value)
    raise ValueError(f"{name} has an invalid value")


def _one_of(value: Any, hints: tuple[Any, ...], name: str, largest: float) -> Any:
    for hint in hints:
        try:
            return None if hint is type(None) and value is None else conform(value, hint, name, largest)
        except ValueError:
            continue
    raise ValueError(f"{name} has an invalid value")


def _is_simple(value: Any, hint: Any, largest: float) -> bool:
    if hint is str:
        return isinstance(value, str) and len(value) <= MAX_TEXT
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return type(value) is int and abs(value) <= largest
    return hint is float and type(value) in (int, float) and abs(value) <= largest  # false for NaN too


def _anything(value: Any, name: str, largest: float, depth: int) -> Any:
    if depth == 0:
        raise ValueError(f"{name} is nested too deeply")
    if isinstance(value, dict):
        return {clean(key): _anything(item, name, largest, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_anything(item, name, largest, depth - 1) for item in value]
    if value is None or isinstance(value, bool):
        return value
    return conform(value, type(value), name, largest)
