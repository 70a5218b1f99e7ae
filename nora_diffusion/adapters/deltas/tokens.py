"""New tokens of a text encoder: learned vectors beside its frozen embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LearnedEmbedding(nn.Embedding):
    """A frozen embedding with the vectors ``[n, width]`` of new words, whose ids :meth:`set_first_ids` sets.

    ``E(id) = vectors[id - first]`` if a word has ``first <= id < first + n``, else ``weight[id]``. The frozen weight
    is the Parameter of ``plain``, which replaces this module when the last word is removed.
    """

    before: Any = None
    """State of the pipeline to restore together with ``plain``; set and read by the loader."""

    def __init__(self, plain: nn.Embedding) -> None:
        super().__init__(
            plain.num_embeddings, plain.embedding_dim, plain.padding_idx, plain.max_norm, plain.norm_type,
            plain.scale_grad_by_freq, plain.sparse, _weight=plain.weight.detach(),
        )  # fmt: skip
        self.weight = plain.weight
        self._plain = (plain,)  # in a tuple, so that it does not become a submodule
        self.nora_tokens = nn.ModuleDict()
        self._words: dict[str, list[str]] = {}
        self._first: dict[str, int] = {}
        self.train(plain.training)

    @property
    def plain(self) -> nn.Embedding:
        """The original embedding."""
        return self._plain[0]

    def add(self, adapter: str, vectors: Mapping[str, Tensor]) -> None:
        """Add the words of an adapter; call :meth:`set_first_ids` next."""
        device = self.weight.device
        self.nora_tokens[adapter] = nn.ParameterList(
            nn.Parameter(value.detach().clone().to(device), requires_grad=False) for value in vectors.values()
        )
        self._words[adapter] = list(vectors)

    def remove(self, adapter: str) -> None:
        """Remove the words of an adapter; call :meth:`set_first_ids` next."""
        del self.nora_tokens[adapter], self._words[adapter]

    def set_first_ids(self, first: Mapping[str, int]) -> None:
        """Set the token id of each word's first vector; its other vectors have the next ids."""
        self._first = dict(first)

    def translated(self, input: Tensor, first: Mapping[str, int]) -> Tensor:
        """Ids in which these words begin at ``first[word]``, as ids of this embedding."""
        out = input
        for adapter in self._words:
            for word, vectors in self.vectors(adapter).items():
                index = input - first.get(word, -len(vectors))
                is_word = (index >= 0) & (index < len(vectors)) & (word in first)
                out = torch.where(is_word, self._first[word] + index, out)
        return out

    @property
    def adapters(self) -> Sequence[str]:
        """The adapters that have words in this embedding."""
        return list(self._words)

    def vectors(self, adapter: str) -> dict[str, nn.Parameter]:
        """The vectors ``[n, width]`` of an adapter's words, by word."""
        if adapter not in self.nora_tokens:
            return {}
        return dict(zip(self._words[adapter], self.nora_tokens[adapter].parameters(), strict=True))

    def forward(self, input: Tensor) -> Tensor:
        """Embeddings ``[..., width]`` of ids, in the frozen weight's dtype."""
        out = super().forward(torch.where(input < self.num_embeddings, input, 0))
        for adapter in self._words:
            for word, vectors in self.vectors(adapter).items():
                index = input - self._first[word]
                is_word = (index >= 0) & (index < len(vectors))
                learned = F.embedding(index.clamp(0, len(vectors) - 1), vectors).to(out.dtype)
                out = torch.where(is_word[..., None], learned, out)
        return out
