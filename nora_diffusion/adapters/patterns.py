"""Regular expressions that select modules: a safe dialect, so that no pattern in a file can hang a program.

Python's ``re`` can take exponential time. A pattern of this dialect cannot: ``*`` and ``+`` stand outside groups, and
between any two of them plain characters must match, so the ways to divide a module's path between them are bounded by
how often those characters occur in it.
"""

from __future__ import annotations

import functools
import re

from ..errors import UserError

MAX_LENGTH = 1000
MAX_REPEATS = 6
MAX_PATTERNS = 2000
MAX_CHOICES, MIN_WORD = 4, 3
"""A group separates two repeats if it has at most this many alternatives, each of at least this many characters."""
TOKEN = re.compile(r"\\.|\[[^\]\[]+\]|\((?:\?[:=!])?|.", re.DOTALL)
PLAIN = re.compile(r"[\w-]|\\[^\w]")


def check_patterns(name: str, patterns: object) -> None:
    """Check a pattern, or the keys of a table of patterns; a list has plain names. Raises :class:`UserError`."""
    found = [patterns] if isinstance(patterns, str) else list(patterns) if isinstance(patterns, dict) else []
    if len(found) > MAX_PATTERNS:
        raise UserError(f"{name} has {len(found):,} entries, more than the {MAX_PATTERNS:,} allowed")
    for pattern in found:
        check_pattern(name, pattern)


def check_pattern(name: str, pattern: str) -> None:
    """Raise :class:`UserError` for an invalid regular expression, or one outside the dialect."""
    try:
        if len(pattern) > MAX_LENGTH:
            raise ValueError(f"it has more than {MAX_LENGTH} characters")
        _check_dialect(pattern)
        re.compile(pattern)
    except (ValueError, re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{name}={pattern[:80]!r} is not an allowed pattern: {error}") from None


def _check_dialect(pattern: str) -> None:
    tokens = TOKEN.findall(pattern)
    depth, repeats, separated, counts = 0, 0, True, [0]  # counts: plain characters in each alternative of the group
    for token, following in zip(tokens, [*tokens[1:], ""], strict=True):
        optional = following in ("*", "+", "?")
        if token == "{" or re.fullmatch(r"\\[^\WdwDWsS]", token):
            raise ValueError("'{', back-references and anchors like \\b are not supported")
        if token.startswith("("):
            depth, counts = depth + 1, [0] if not depth and token in ("(", "(?:") else counts
        elif token == ")":
            depth -= 1
            if not depth and not optional:
                separated = separated or (len(counts) <= MAX_CHOICES and min(counts) >= MIN_WORD)
        elif token in ("*", "+"):
            repeats += 1
            if depth or repeats > MAX_REPEATS:
                raise ValueError(f"'*' and '+' must stand outside groups, at most {MAX_REPEATS} times")
            if not separated:
                raise ValueError("between two '*' or '+' there must be a plain character or word")
            separated = False
        elif token == "|":
            counts = [*counts, 0] if depth else counts
            separated = separated or not depth
        elif PLAIN.fullmatch(token) and not optional:
            counts = [*counts[:-1], counts[-1] + 1] if depth == 1 else counts
            separated = separated or not depth
        if token == ")" and following in ("*", "+"):
            raise ValueError("a group cannot be repeated")


@functools.lru_cache(maxsize=4096)
def suffix_matcher(pattern: str) -> re.Pattern[str]:
    """A matcher for keys of ``rank_pattern``, as PEFT reads them: they match the end of a path, from a dot on."""
    return re.compile(rf"(.*\.)?({pattern})$")


def pattern_of(path: str) -> str:
    """The key of ``rank_pattern`` for this path only; a name without a dot could also be the end of other paths."""
    return path if "." in path else f"^{path}"
