"""The rank of each layer of an adapter file, where these differ, and as text. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .adapter_file import open_adapter
from .keys import Projection, factors_by_projection

NARROW = ("A_in", "A")
"""The factors that have a row for each rank, the narrowest first."""


def layer_ranks(path: str | Path) -> dict[Projection, int]:
    """The rank of each layer at the narrowest point of its chain, in the order of the file.

    Empty for an adapter whose layers all have the same rank setting, and for files of other tools. Raises
    :class:`UserError` as ``inspect_adapter``.
    """
    with open_adapter(path) as adapter:
        info = adapter.info
        if not info.is_ours or not any(axes.rank_pattern or axes.inner_rank_pattern for axes in info.axes.values()):
            return {}
        layers = factors_by_projection(adapter.read())
    found = {
        layer: next((value.shape[0] for name in NARROW if (value := factors.get(name)) is not None), 0)
        for layer, factors in layers.items()
    }
    return {layer: rank for layer, rank in found.items() if rank}


def block_of(component: str, path: str) -> str:
    """The block of a layer: the first words of its path, of a component beside the denoiser with its name."""
    words = path.split(".")
    block = ".".join(words[:2]) if len(words) > 1 and words[1].isdigit() else words[0]
    return block if component in ("unet", "transformer") else f"{component}.{block}"


def by_block(ranks: Mapping[Projection, int]) -> dict[str, list[int]]:
    """The ranks of the layers of each block."""
    found: dict[str, list[int]] = {}
    for (component, path), rank in ranks.items():
        found.setdefault(block_of(component, path), []).append(rank)
    return found


def ranks_text(ranks: Mapping[Projection, int]) -> str:
    """The ranks as text: a line for each block with the mean of its layers and all of them, and one with the mean."""
    blocks = by_block(ranks)
    width = max(map(len, blocks))
    lines = [f"{'ranks by layer':<{width}}  mean"]
    lines += [
        f"{name:<{width}}  {sum(own) / len(own):>4.1f}  {' '.join(map(str, own))}" for name, own in blocks.items()
    ]
    return "\n".join([*lines, f"{len(ranks)} layers, mean rank {sum(ranks.values()) / len(ranks):.1f}"])
