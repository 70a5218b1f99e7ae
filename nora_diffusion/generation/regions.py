"""Where the subjects of a prompt appear in an image, read from the cross-attention while the image is generated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHARPNESS = 4.0
"""Exponent of the attention before the subjects share a position: at 1 they overlap much, at infinity not at all."""
SMALLEST, LARGEST = 64, 1024
"""Tokens of the images whose attention is read: finer layers attend to texture, coarser ones cannot tell subjects."""

Size = tuple[int, int]


def cross_attentions(model: nn.Module) -> dict[str, Any]:
    """The attention layers of a UNet whose keys and values come from the prompt alone, by path."""
    return {path: module for path, module in model.named_modules() if getattr(module, "is_cross_attention", False)}


def grid(latents: Size, tokens: int) -> Size | None:
    """Height and width of a layer with this many image tokens: a UNet halves its latents, rounding up."""
    height, width = latents
    while height * width > tokens and height * width > 1:
        height, width = -(-height // 2), -(-width // 2)
    return (height, width) if height * width == tokens else None


def resized(maps: Tensor, size: Size) -> Tensor:
    """Maps ``[n, h, w]`` at another size: averaged over areas, or interpolated."""
    if tuple(maps.shape[1:]) == size:
        return maps
    if size[0] <= maps.shape[1] and size[1] <= maps.shape[2]:
        return F.adaptive_avg_pool2d(maps.unsqueeze(1), size).squeeze(1)
    return F.interpolate(maps.unsqueeze(1), size, mode="bilinear", align_corners=False).squeeze(1)


def shares(maps: Sequence[Tensor]) -> list[Tensor]:
    """``M_k^g / sum_j M_j^g`` of the subjects' maps ``M_k [n, h, w]``, each divided by its mean, ``g = SHARPNESS``.

    They add up to 1 everywhere, so that two adapters never add up to more than one.
    """
    stacked = torch.stack(list(maps))
    relative = stacked / stacked.mean((-2, -1), keepdim=True).clamp(min=1e-12)
    powers = (relative / relative.amax(0).clamp(min=1e-12)) ** SHARPNESS
    return list(powers / powers.sum(0))


class AttentionMaps:
    """How much each image token attends to the words of each subject: ``sum_t softmax(q k^T)_t``, heads averaged.

    Summed over layers and passes since :meth:`clear`.
    """

    def __init__(self) -> None:
        self.latents: Size = (0, 0)
        self.words: Mapping[str, Tensor] = {}
        self.count = 0
        """Layers read since :meth:`clear`."""
        self._maps: dict[Size, dict[str, Tensor]] = {}

    def clear(self) -> None:
        """Forget all maps: a new image begins."""
        self._maps, self.count = {}, 0

    def start(self, latents: Size, words: Mapping[str, Tensor]) -> None:
        """A pass begins: the size of its latents, and the masks ``[n, T]`` of each subject's words.

        ``n`` counts the images: of a batch with guidance, the last half of the rows.
        """
        self.latents, self.words = latents, words

    def watch(self, attention: Any) -> list[Callable[[], None]]:
        """Read the maps of a cross-attention layer at each pass; returns what undoes that."""
        query: list[Tensor] = []

        def on_query(_: nn.Module, __: Any, output: Tensor) -> None:
            query[:] = [output]

        def on_key(_: nn.Module, __: Any, output: Tensor) -> None:
            if query:
                self._add(query.pop(), output, attention.heads, attention.scale)

        hooks = attention.to_q.register_forward_hook(on_query), attention.to_k.register_forward_hook(on_key)
        return [hook.remove for hook in hooks]

    def _add(self, query: Tensor, key: Tensor, heads: int, scale: float) -> None:
        size = grid(self.latents, query.shape[1]) if SMALLEST <= query.shape[1] <= LARGEST else None
        if size is None:
            return
        count = len(next(iter(self.words.values())))
        q, k = (t[-count:].float().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key))
        attended = (q @ k.transpose(-1, -2) * scale).softmax(-1).mean(1)  # [n, tokens, T]
        found = self._maps.setdefault(size, {})
        self.count += 1
        for name, words in self.words.items():
            new = (attended @ words.to(attended).unsqueeze(-1)).view(count, *size)
            found[name] = found[name] + new if name in found else new

    def maps(self) -> dict[str, Tensor]:
        """The map of each subject, ``[n, h, w]``; empty before the first pass. Differentiable if the pass was."""
        if not self._maps:
            return {}
        finest = max(self._maps, key=lambda size: size[0] * size[1])
        return {
            name: torch.stack([resized(own[name], finest) for own in self._maps.values()]).sum(0) for name in self.words
        }

    def regions(self) -> dict[str, Tensor]:
        """The share of each subject in each position, ``[n, h, w]``; empty before the first pass."""
        maps = self.maps()
        return dict(zip(maps, shares(list(maps.values())), strict=True)) if maps else {}
