"""Text embeddings of the prompts of a run, computed once unless the text encoder is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...loaders.tokens import expanded, extended_tokenizer
from ...pipelines.components import text_encoders, tokenizers
from ..settings.config import TrainConfig
from ..step.denoiser import TextEmbeddings, encode_prompts, family_of, zeros_for_empty_prompts
from .encoding_cache import EncodingCache, dtype_and_device, module_hash


class PromptEmbeddings:
    """Embeds prompts for the denoiser: cached, or in every step if the text encoder or new tokens are trained."""

    def __init__(
        self, pipe: Any, config: TrainConfig, prompts: Sequence[str], cache: EncodingCache | None = None
    ) -> None:
        self._pipe, self._config, self._encoder = pipe, config, pipe.text_encoder
        self._length = config.tokenizer_max_length
        self._is_sd = family_of(pipe) == "sd"
        self._trained = config.encodes_each_step
        self._use_mask = config.text_encoder_use_attention_mask
        unique = list(dict.fromkeys(prompts))
        self._prompts = unique
        self._row = {prompt: row for row, prompt in enumerate(unique)}
        self._tokenize()
        if not self._trained:
            self._cached = self._encode_all(cache or EncodingCache())

    def __call__(self, prompts: Sequence[str]) -> TextEmbeddings:
        """Text embeddings of ``prompts``."""
        rows = [self._row[prompt] for prompt in prompts]
        return self._encode(rows) if self._trained else {name: value[rows] for name, value in self._cached.items()}

    def _tokenize(self) -> None:
        self._tokenizer = self._pipe.tokenizer
        prompts = expanded(self._pipe, self._prompts, self._tokenizer)
        found = tokenize(self._tokenizer, prompts, token_limit(self._config, self._pipe))
        self._ids, self._mask = (value.to(self._encoder.device) for value in found)

    @torch.no_grad()
    def _encode_all(self, cache: EncodingCache) -> TextEmbeddings:
        """Encode prompt by prompt, so that embeddings do not depend on the other prompts."""
        encoders = text_encoders(self._pipe) if cache.disk else []
        encoder_keys = [[module_hash(encoder), *dtype_and_device(encoder)] for encoder in encoders]
        found = [
            cache("text", partial(self._cache_inputs, row, encoder_keys), partial(self._encode, [row]))
            for row in range(len(self._prompts))
        ]
        device = self._encoder.device
        return {name: torch.cat([each[name] for each in found]).to(device) for name in found[0]}

    def _cache_inputs(self, row: int, encoder_keys: list[Any]) -> dict[str, Any]:
        """Everything that the embedding of a prompt depends on; tokenizers are covered by the token ids."""
        prompt, pipe = self._prompts[row], self._pipe
        return {
            "prompt": prompt,
            "tokens": self._ids[row].tolist(),
            "mask": self._mask[row].tolist() if self._use_mask else None,
            "tokenizers": [[t(prompt).input_ids, t.pad_token_id, t.model_max_length] for t in tokenizers(pipe)],
            "length": self._length,
            "family": family_of(pipe),
            "zeros": zeros_for_empty_prompts(pipe),
            "encoders": encoder_keys,
        }

    def _encode(self, rows: list[int]) -> TextEmbeddings:
        if not self._is_sd:
            return encode_prompts(self._pipe, [self._prompts[row] for row in rows], self._length)
        if self._tokenizer is not self._pipe.tokenizer:  # the tokens of another adapter were added or removed
            self._tokenize()
        mask = self._mask[rows] if self._use_mask else None
        hidden: Tensor = self._encoder(self._ids[rows], attention_mask=mask, return_dict=False)[0]
        return {"hidden": hidden}


def token_limit(config: TrainConfig, pipe: Any) -> int:
    """Maximum number of tokens that the first text encoder gets."""
    return (config.tokenizer_max_length if family_of(pipe) == "sd" else None) or pipe.tokenizer.model_max_length


def truncated_prompts(
    pipe: Any, prompts: Sequence[str], length: int, new_tokens: Mapping[str, int] | None = None
) -> list[str]:
    """The prompts that have more than ``length`` tokens. ``new_tokens``: those to be added, each with its vectors."""
    tokenizer = extended_tokenizer(pipe.tokenizer, new_tokens) if new_tokens else pipe.tokenizer
    texts = expanded(pipe, prompts, tokenizer)
    return [p for p, text in zip(prompts, texts, strict=True) if len(tokenizer(text).input_ids) > length]


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask ``[prompts, length]``; longer prompts are truncated."""
    encoded = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return encoded.input_ids, encoded.attention_mask
