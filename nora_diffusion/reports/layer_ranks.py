"""The ranks of an adapter's layers, as text: by component and path of each layer."""

from __future__ import annotations

from collections.abc import Mapping


def block_of(component: str, path: str) -> str:
    """The block of a layer: the first words of its path, of a component beside the denoiser with its name."""
    words = path.split(".")
    block = ".".join(words[:2]) if len(words) > 1 and words[1].isdigit() else words[0]
    return block if component in ("unet", "transformer") else f"{component}.{block}"


def by_block(ranks: Mapping[tuple[str, str], int]) -> dict[str, list[int]]:
    """The ranks of the layers of each block."""
    found: dict[str, list[int]] = {}
    for (component, path), rank in ranks.items():
        found.setdefault(block_of(component, path), []).append(rank)
    return found


def ranks_text(ranks: Mapping[tuple[str, str], int]) -> str:
    """The ranks as text: a line for each block with the mean of its layers and all of them, and one with the mean."""
    blocks = by_block(ranks)
    width = max(map(len, blocks))
    lines = [f"{'ranks by layer':<{width}}  mean"]
    lines += [
        f"{name:<{width}}  {sum(own) / len(own):>4.1f}  {' '.join(map(str, own))}" for name, own in blocks.items()
    ]
    return "\n".join([*lines, f"{len(ranks)} layers, mean rank {sum(ranks.values()) / len(ranks):.1f}"])
