"""Several captions per image: shuffled tags, and caption dropout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

SEPARATOR = ", "


@dataclass(frozen=True)
class CaptionVariants:
    """The captions of each image; a share ``dropout`` of the draws gives the empty prompt instead."""

    of_image: Sequence[Sequence[str]]
    dropout: float = 0.0

    def all(self) -> list[str]:
        """Every prompt that may be drawn, once."""
        prompts = dict.fromkeys(text for texts in self.of_image for text in texts)
        return [*prompts, *([""] if self.dropout and "" not in prompts else [])]

    def draw(self, images: Sequence[int], source: torch.Generator) -> list[str]:
        """A prompt for each image, given by index. Consumes two random numbers per image."""
        prompts = []
        for image in images:
            texts = self.of_image[image]
            choice = int(torch.randint(len(texts), (1,), generator=source))
            dropped = float(torch.rand((), generator=source)) < self.dropout
            prompts.append("" if dropped else texts[choice])
        return prompts


def tag_orders(caption: str, count: int, keep: int, source: torch.Generator) -> list[str]:
    """Up to ``count`` different orders of the comma-separated tags of ``caption``; the first ``keep`` tags stay first.

    They are drawn once instead of at each step, so that their embeddings can be precomputed.
    """
    tags = [stripped for tag in caption.split(",") if (stripped := tag.strip())]
    head, tail = tags[:keep], tags[keep:]
    if len(tail) < 2:
        return [caption]
    orders: dict[str, None] = {}
    for _ in range(4 * count):  # few tags have fewer than `count` orders
        if len(orders) == count:
            break
        shuffled = [tail[i] for i in torch.randperm(len(tail), generator=source).tolist()]
        orders[SEPARATOR.join([*head, *shuffled])] = None
    return list(orders)
