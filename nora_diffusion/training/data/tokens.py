"""Pivotal tuning: new tokens of the subject, learned together with the adapter and saved in its file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...data.captions import word_pattern
from ...errors import UserError
from ...loaders.tokens import add_tokens, check_words, start_vectors
from ...pipelines.components import component
from ..settings.config import TrainConfig
from ..settings.resolved import ResolvedConfig
from ..step.denoiser import TRAINED_ENCODERS, family_of
from ..step.randomness import generator


def abstractions(config: TrainConfig) -> list[str]:
    """The words that ``token_abstraction`` names, which may be separated by commas as in diffusers' scripts."""
    return [word for entry in config.token_abstraction or () for part in entry.split(",") if (word := part.strip())]


def new_tokens_of(config: TrainConfig, trigger: str | None, class_word: str | None) -> dict[str, str | None]:
    """The new tokens of a run, each with the words that it starts from (``None``: noise).

    Raises :class:`UserError` where there is no word to learn.
    """
    if not config.train_text_encoder_ti:
        return {}
    words = abstractions(config) or ([trigger] if trigger else [])
    if not words:
        raise UserError("--train_text_encoder_ti has no word to learn: put one such as <dog> into the prompt")
    return dict.fromkeys(words, config.initializer_concept or class_word)


def check_new_tokens(config: TrainConfig, pipe: Any, words: Sequence[str], captions: Sequence[str]) -> None:
    """Raise :class:`UserError` for a token that no caption has, or that the pipeline cannot take."""
    for word in words:
        if not any(re.search(word_pattern(word), caption) for caption in captions):
            raise UserError(f"no caption has the new token {word!r}, so it would learn nothing: put it into the prompt")
    count = config.num_new_tokens_per_abstraction
    check_words(pipe, {word: dict.fromkeys(TRAINED_ENCODERS[family_of(pipe)], (count,)) for word in words})


def add_new_tokens(config: ResolvedConfig, pipe: Any, adapter: str, words: Mapping[str, str | None]) -> None:
    """Make the words known to the text encoders, as tokens of ``adapter`` that start from what they are like."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for word, concept in words.items():
        for part in TRAINED_ENCODERS[family_of(pipe)]:
            encoder: Any = component(pipe, part)
            size = config.num_new_tokens_per_abstraction, encoder.get_input_embeddings().embedding_dim
            noise = torch.randn(size, generator=generator(config.seed, "new token", word, part))
            found.setdefault(word, {})[part] = start_vectors(pipe, part, size[0], concept, noise)
    add_tokens(pipe, adapter, found)
