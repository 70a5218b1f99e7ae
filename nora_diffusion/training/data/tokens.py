"""Pivotal tuning: new tokens that are trained with the adapter and saved in its file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...data.captions import word_pattern
from ...errors import UserError
from ...loaders.tokens import add_tokens, check_tokens, start_vectors
from ...pipelines.components import components, tokenizer_name
from ..settings.config import TrainConfig
from ..settings.resolved import ResolvedConfig
from ..step.denoiser import TRAINED_ENCODERS, family_of
from ..step.randomness import generator
from .prompts import token_limit

SPECIAL_TOKENS = 2
"""Start and end of a prompt."""


def check_new_tokens(config: TrainConfig, pipe: Any, words: Sequence[str], captions: Sequence[str]) -> None:
    """Raise :class:`UserError` for a token that is in no caption, is longer than a prompt, or cannot be added."""
    for word in words:
        if not any(re.search(word_pattern(word), caption) for caption in captions):
            raise UserError(
                f"no caption contains the new token {word!r}, so it would not be trained: put it into the prompt"
            )
    count, limit = config.num_new_tokens_per_abstraction, token_limit(config, pipe)
    if words and count > limit - SPECIAL_TOKENS:
        raise UserError(
            f"num_new_tokens_per_abstraction={count} does not fit into the {limit} tokens of a prompt: choose at most "
            f"{limit - SPECIAL_TOKENS}"
        )
    shapes = {word: dict.fromkeys(TRAINED_ENCODERS[family_of(pipe)], (count,)) for word in words}
    check_tokens(pipe, components(pipe), shapes)


def add_new_tokens(config: ResolvedConfig, pipe: Any, adapter: str, words: Mapping[str, str | None]) -> None:
    """Add the words to tokenizers and text encoders as tokens of ``adapter``, initialized from their concepts."""
    modules = components(pipe)
    vectors: dict[str, dict[str, torch.Tensor]] = {}
    for word, concept in words.items():
        for name in TRAINED_ENCODERS[family_of(pipe)]:
            encoder: Any = modules[name]
            size = config.num_new_tokens_per_abstraction, encoder.get_input_embeddings().embedding_dim
            noise = torch.randn(size, generator=generator(config.seed, "new token", word, name))
            vectors.setdefault(word, {})[name] = start_vectors(
                encoder, getattr(pipe, tokenizer_name(name)), size[0], concept, noise
            )
    add_tokens(pipe, modules, adapter, vectors)
