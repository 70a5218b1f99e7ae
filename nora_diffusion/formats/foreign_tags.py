"""What files of other tools say about their subject in words: the captions' tags, and hints for users."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping

from ..io.untrusted import clean, conform, parse_json

MAX_TAGS, MAX_LENGTH = 20, 1000
HINTS = ("modelspec.usage_hint", "modelspec.tags")
"""Entries of Stability AI's model metadata that name the subject."""
TAGS = "ss_tag_frequency"
"""kohya's entry: how often each tag or caption occurs, by folder of images, as JSON."""


def prompts_of(metadata: Mapping[str, str]) -> list[str]:
    """Prompts that describe the file's subject, by its metadata; damaged entries are skipped."""
    hints = (clean(metadata.get(key, ""))[:MAX_LENGTH] for key in HINTS)
    return [text for text in (*hints, ", ".join(_frequent(metadata.get(TAGS, "{}")))) if text]


def _frequent(text: str) -> list[str]:
    """The most frequent tags, most frequent first."""
    with contextlib.suppress(ValueError):
        folders = conform(parse_json(text), dict[str, dict[str, int]], TAGS, 2**53)
        counts: Counter[str] = Counter()
        for tags in folders.values():
            counts.update({tag.strip()[:MAX_LENGTH]: count for tag, count in tags.items()})
        return [tag for tag, _ in counts.most_common(MAX_TAGS) if tag]
    return []
