"""The captions of a run's images."""

from __future__ import annotations

from collections.abc import Sequence

from ...data.caption_variants import CaptionVariants, tag_orders
from ..settings.resolved import ResolvedConfig
from ..step.randomness import generator


def caption_variants(config: ResolvedConfig, captions: Sequence[str]) -> CaptionVariants:
    """The possible captions of each image: tag orders, and dropout."""
    if not config.shuffle_tags:
        return CaptionVariants([[caption] for caption in captions], config.caption_dropout)
    sources = [generator(config.seed, "tags", caption) for caption in captions]
    texts = [
        tag_orders(caption, config.shuffle_tags, config.keep_tokens, source)
        for caption, source in zip(captions, sources, strict=True)
    ]
    return CaptionVariants(texts, config.caption_dropout)
