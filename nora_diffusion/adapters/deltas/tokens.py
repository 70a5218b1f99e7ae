"""New words of a text encoder: learned rows beside its frozen table of embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LearnedEmbedding(nn.Embedding):
    """A frozen embedding and the vectors ``[n, width]`` of new words, which have the ids that ``number`` gives them.

    ``E(id) = vectors[id - first]`` where a word has ``first <= id < first + n``, else ``weight[id]``. The frozen weight
    is the same Parameter as that of ``plain``, which takes its place again when the last word is gone.
    """

    before: Any = None
    """What whoever put this into a model has to put back beside ``plain``."""

    def __init__(self, plain: nn.Embedding) -> None:
        super().__init__(
            plain.num_embeddings, plain.embedding_dim, plain.padding_idx, plain.max_norm, plain.norm_type,
            plain.scale_grad_by_freq, plain.sparse, _weight=plain.weight.detach(),
        )  # fmt: skip
        self.weight = plain.weight
        self._plain = (plain,)  # in a tuple, so that it is no submodule
        self.nora_tokens = nn.ModuleDict()
        self._words: dict[str, list[str]] = {}
        self._first: dict[str, int] = {}
        self.train(plain.training)

    @property
    def plain(self) -> nn.Embedding:
        """The embedding without new words."""
        return self._plain[0]

    def put(self, adapter: str, vectors: Mapping[str, Tensor]) -> None:
        """Add the words of an adapter; :meth:`number` must follow."""
        device = self.weight.device
        self.nora_tokens[adapter] = nn.ParameterList(
            nn.Parameter(value.detach().clone().to(device), requires_grad=False) for value in vectors.values()
        )
        self._words[adapter] = list(vectors)

    def take(self, adapter: str) -> None:
        """Remove the words of an adapter; :meth:`number` must follow."""
        del self.nora_tokens[adapter], self._words[adapter]

    def number(self, first: Mapping[str, int]) -> None:
        """Set the first id of each word."""
        self._first = dict(first)

    @property
    def adapters(self) -> Sequence[str]:
        """The adapters that have words here."""
        return list(self._words)

    def of(self, adapter: str) -> dict[str, nn.Parameter]:
        """The vectors of an adapter's words."""
        return dict(zip(self._words.get(adapter, ()), self._vectors(adapter), strict=True))

    def _vectors(self, adapter: str) -> Iterator[nn.Parameter]:
        return self.nora_tokens[adapter].parameters() if adapter in self.nora_tokens else iter(())

    def forward(self, input: Tensor) -> Tensor:
        """Embeddings ``[..., width]`` of ids, in the frozen weight's dtype."""
        out = super().forward(torch.where(input < self.num_embeddings, input, 0))
        for adapter in self._words:
            for word, vectors in self.of(adapter).items():
                place = input - self._first[word]
                mine = (place >= 0) & (place < len(vectors))
                own = F.embedding(place.clamp(0, len(vectors) - 1), vectors).to(out.dtype)
                out = torch.where(mine[..., None], own, out)
        return out
