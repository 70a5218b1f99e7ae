"""Text embeddings, which do not change while only the denoiser trains, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...loaders.tokens import expanded
from ...pipelines.components import text_encoders, tokenizers
from ..settings.config import TrainConfig
from ..step.denoiser import TextEmbeddings, encode_prompts, family_of, zeros_for_empty_prompts
from .encoding_cache import EncodingCache, module_hash, place


class PromptEmbeddings:
    """Prompts as the UNet wants them: from a cache, or afresh each step while text encoder or tokens are trained."""

    def __init__(
        self, pipe: Any, config: TrainConfig, prompts: Sequence[str], cache: EncodingCache | None = None
    ) -> None:
        self._pipe, self._config, self._encoder = pipe, config, pipe.text_encoder
        self._length = config.tokenizer_max_length
        self._plain = family_of(pipe) == "sd"
        self._live = config.encodes_each_step
        self._masked = config.text_encoder_use_attention_mask
        unique = list(dict.fromkeys(prompts))
        self._prompts = unique
        self._row = {prompt: row for row, prompt in enumerate(unique)}
        self._tokenize()
        if not self._live:
            self._cached = self._encode_all(cache or EncodingCache())

    def __call__(self, prompts: Sequence[str]) -> TextEmbeddings:
        """What the denoiser is told of these prompts."""
        rows = [self._row[prompt] for prompt in prompts]
        return self._encode(rows) if self._live else {name: value[rows] for name, value in self._cached.items()}

    def _tokenize(self) -> None:
        self._tokenizer = self._pipe.tokenizer
        prompts = expanded(self._pipe, self._prompts, self._tokenizer)
        found = tokenize(self._tokenizer, prompts, token_limit(self._config, self._pipe))
        self._ids, self._mask = (value.to(self._encoder.device) for value in found)

    @torch.no_grad()
    def _encode_all(self, cache: EncodingCache) -> TextEmbeddings:
        """Prompt by prompt, so that the numbers of one do not depend on which others are there."""
        encoders = text_encoders(self._pipe) if cache.disk else []
        made_by = [[module_hash(encoder), *place(encoder)] for encoder in encoders]
        found = [
            cache("text", partial(self._ingredients, row, made_by), partial(self._encode, [row]))
            for row in range(len(self._prompts))
        ]
        device = self._encoder.device
        return {name: torch.cat([each[name] for each in found]).to(device) for name in found[0]}

    def _ingredients(self, row: int, made_by: list[Any]) -> dict[str, Any]:
        """All that the embedding of a prompt depends on: the tokens stand for the tokenizers."""
        prompt, pipe = self._prompts[row], self._pipe
        return {
            "prompt": prompt,
            "tokens": self._ids[row].tolist(),
            "mask": self._mask[row].tolist() if self._masked else None,
            "tokenizers": [[t(prompt).input_ids, t.pad_token_id, t.model_max_length] for t in tokenizers(pipe)],
            "length": self._length,
            "family": family_of(pipe),
            "zeros": zeros_for_empty_prompts(pipe),
            "encoders": made_by,
        }

    def _encode(self, rows: list[int]) -> TextEmbeddings:
        if not self._plain:
            return encode_prompts(self._pipe, [self._prompts[row] for row in rows], self._length)
        if self._tokenizer is not self._pipe.tokenizer:  # another adapter's tokens came or went
            self._tokenize()
        mask = self._mask[rows] if self._masked else None
        hidden: Tensor = self._encoder(self._ids[rows], attention_mask=mask, return_dict=False)[0]
        return {"hidden": hidden}


def token_limit(config: TrainConfig, pipe: Any) -> int:
    """How many tokens the first text encoder is given of a prompt."""
    return (config.tokenizer_max_length if family_of(pipe) == "sd" else None) or pipe.tokenizer.model_max_length


def truncated_prompts(tokenizer: Any, prompts: Sequence[str], length: int) -> list[str]:
    """Those of the prompts that have more tokens than ``length``."""
    return [prompt for prompt in prompts if len(tokenizer(prompt, truncation=False).input_ids) > length]


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Token ids and padding mask ``[prompts, length]``; the end of a longer prompt is cut off."""
    encoded = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return encoded.input_ids, encoded.attention_mask
