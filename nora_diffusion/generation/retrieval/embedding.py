"""Texts as vectors, by the text encoders of a pipeline.

The vector of a text is the mean of the states of its content words. The state at the end of a text, which CLIP compares
with images, says little in an encoder that was trained together with its denoiser, and the states of "a", "photo" and
"of" are the same in every prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...adapters.tuner.merging import bit_sum
from ...pipelines.components import components, projections, tokenizer_name, without_adapters
from ...pipelines.fingerprints import fingerprint
from ...pipelines.names import DENOISERS
from .words import is_content, phrases

VERSION = 1
"""To be changed with what :meth:`TextEmbedding.__call__` computes: cached vectors depend on it."""
BATCH_SIZE = 32
MAX_TOKENS = 256
"""Tokens that are read of a text, for encoders without a shorter limit of their own."""


class TextEmbedding:
    """The vectors of texts: with the mean state ``h_e(w)`` of the tokens of the word ``w`` in the encoder ``e``,

    ``f(text) = (u_1, ..., u_n) / sqrt(n)``, ``u_e = m_e / |m_e|``, ``m_e = sum_w a(w) h_e(w)``,

    so that ``f(a) . f(b)`` is the mean of the encoders' cosines. ``a(w)`` is 0 for words that say nothing about the
    image, else the weight of their phrase (:mod:`.words`). The encoders are the pipeline's CLIPs, or all if it has
    none, since a T5 beside them is many times as large. Adapters on them have no effect here.
    """

    def __init__(self, pipe: Any) -> None:
        modules = components(pipe)
        encoders = {name: module for name, module in modules.items() if name not in DENOISERS}
        clips = {name: module for name, module in encoders.items() if _is_clip(module)}
        self._encoders: dict[str, Any] = clips or encoders
        self._pipe = pipe

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """The vectors ``[n, d]`` in fp32 on the CPU; all zeros for a text without content words."""
        with torch.no_grad(), without_adapters(self._encoders):
            found = [self._encode(name, texts) for name in self._encoders]
        return torch.cat(found, 1) / len(found) ** 0.5

    def key(self) -> str:
        """Changes with the weights of the encoders and the tokenizers; for the names of cached vectors."""
        content = [VERSION, [[name, *self._identity(name, encoder)] for name, encoder in self._encoders.items()]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _identity(self, name: str, encoder: Any) -> list[Any]:
        prints = [fingerprint(layer, path) for path, layer in projections(encoder).items()]
        return [prints, bit_sum(encoder.get_input_embeddings().weight), len(self._tokenizer(name))]

    def _tokenizer(self, name: str) -> Any:
        return getattr(self._pipe, tokenizer_name(name))

    def _encode(self, name: str, texts: Sequence[str]) -> Tensor:
        encoder, read = self._encoders[name], [_tokens(self._tokenizer(name), text) for text in texts]
        means = torch.zeros(len(texts), encoder.config.hidden_size)
        order = sorted((len(ids), row) for row, (ids, weights) in enumerate(read) if any(weights))
        for rows in _batches(order):
            ids = torch.tensor([read[row][0] for row in rows], device=encoder.device)
            weights = torch.tensor([read[row][1] for row in rows])
            states = encoder(ids).last_hidden_state.float().cpu()
            means[rows] = F.normalize(torch.einsum("nt,ntd->nd", weights, states), dim=1)
        return means


def _batches(order: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Rows of texts of one length, so that no text is padded."""
    for _, group in groupby(order, key=lambda item: item[0]):
        rows = [row for _, row in group]
        yield from (rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE))


def _tokens(tokenizer: Any, text: str) -> tuple[list[int], list[float]]:
    """The token ids of a text, and the weight of each token: the weight of its word, divided by the word's tokens."""
    *start, end = tokenizer("").input_ids  # CLIP begins a text with a token of its own, T5 does not
    limit = min(tokenizer.model_max_length, MAX_TOKENS) - 1
    ids, weights = list(start), [0.0] * len(start)
    for word, weight in ((word, phrase.weight) for phrase in phrases(text) for word in phrase.words):
        own = tokenizer(word, add_special_tokens=False).input_ids
        if len(ids) + len(own) > limit:
            break
        ids += own
        weights += [weight / len(own) if is_content(word) else 0.0] * len(own)
    return [*ids, end], [*weights, 0.0]


def _is_clip(encoder: Any) -> bool:
    return str(getattr(encoder.config, "model_type", "")).startswith("clip")
