"""One photo in several wordings: its tags in another order, or no words at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

SEPARATOR = ", "


@dataclass(frozen=True)
class CaptionVariants:
    """What each photo may be called, and the share of draws in which it is called nothing (``dropout``)."""

    of_image: Sequence[Sequence[str]]
    dropout: float = 0.0

    def all(self) -> list[str]:
        """Every prompt that may be drawn, once."""
        words = dict.fromkeys(text for texts in self.of_image for text in texts)
        return [*words, *([""] if self.dropout and "" not in words else [])]

    def draw(self, photos: Sequence[int], source: torch.Generator) -> list[str]:
        """A prompt for each photo; where there is no choice the same one always."""
        chosen = []
        for photo in photos:
            texts = self.of_image[photo]
            place = int(torch.randint(len(texts), (1,), generator=source))
            dropped = float(torch.rand((), generator=source)) < self.dropout
            chosen.append("" if dropped else texts[place])
        return chosen


def tag_orders(caption: str, count: int, keep: int, source: torch.Generator) -> list[str]:
    """Up to ``count`` different orders of the comma-separated tags of ``caption``; the first ``keep`` tags stay put.

    They are drawn once and not at each step, so that their embeddings can be computed beforehand.
    """
    tags = [tag for part in caption.split(",") if (tag := part.strip())]
    head, tail = tags[:keep], tags[keep:]
    if len(tail) < 2:
        return [caption]
    found: dict[str, None] = {}
    for _ in range(4 * count):  # a few tags have fewer orders than asked for
        if len(found) == count:
            break
        turned = [tail[i] for i in torch.randperm(len(tail), generator=source).tolist()]
        found[SEPARATOR.join([*head, *turned])] = None
    return list(found)
