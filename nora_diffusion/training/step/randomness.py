"""Everything random is a function of seed, step and micro-step: a resumed run draws what it would have."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch


def derive(seed: int, *names: object) -> int:
    """An independent seed in ``[0, 2^63)`` for a purpose, as in ``derive(seed, "noise", step, micro)``."""
    text = ":".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator seeded by :func:`derive`; the same numbers come whatever device the model is on."""
    return torch.Generator().manual_seed(derive(seed, *names))


def forked(device: torch.device) -> AbstractContextManager[None]:
    """Puts the global generators of the CPU and of ``device`` back at the end, and starts no other device."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device.index or 0], device_type=device.type)


def shuffled_indices(seed: int, name: str, count: int, start: int, size: int) -> list[int]:
    """Rows ``start .. start + size`` of endless epochs, each a fresh permutation of ``count`` items."""
    return [row for _, row in zip(range(size), _rows_from(seed, name, count, start), strict=False)]


def batch_indices(seed: int, name: str, groups: Sequence[Hashable], number: int, size: int) -> list[int]:
    """``size`` rows of batch ``number``, all of one group: row ``i`` belongs to ``groups[i]``.

    An epoch is as many batches as there are rows; each group has as many of them as it has rows and goes through
    its rows in endless permutations of its own. So every row comes equally often, whatever the sizes of groups.
    """
    count = len(groups)
    if len(set(groups)) == 1:
        return shuffled_indices(seed, name, count, number * size, size)
    epoch, place = divmod(number, count)
    order = torch.randperm(count, generator=generator(seed, name, "groups", epoch)).tolist()
    group = groups[order[place]]
    rows = [row for row in range(count) if groups[row] == group]
    earlier = epoch * len(rows) + sum(groups[row] == group for row in order[:place])
    return [rows[i] for i in shuffled_indices(seed, f"{name} {group}", len(rows), earlier * size, size)]


def balanced_indices(seed: int, name: str, owners: Sequence[Hashable], start: int, size: int) -> list[int]:
    """Rows ``start .. start + size`` of endless rounds in which every owner comes once, in a fresh order.

    Row ``i`` is of ``owners[i]``; each owner goes through its rows in endless permutations of its own.
    """
    names = list(dict.fromkeys(owners))
    found = []
    for place, turn in enumerate(shuffled_indices(seed, f"{name} owners", len(names), start, size), start):
        own = [row for row, owner in enumerate(owners) if owner == names[turn]]
        found.append(own[shuffled_indices(seed, f"{name} {names[turn]}", len(own), place // len(names), 1)[0]])
    return found


def owned_indices(
    seed: int, name: str, owners: Sequence[Hashable], groups: Sequence[Hashable], number: int, size: int
) -> list[int]:
    """``size`` rows of batch ``number``, all of one owner and one group: owners take turns batch by batch.

    Row ``i`` is of ``owners[i]`` and ``groups[i]``; an owner's own batches are those of :func:`batch_indices`.
    """
    names = list(dict.fromkeys(owners))
    owner = names[shuffled_indices(seed, f"{name} owners", len(names), number, 1)[0]]
    own = [row for row, whose in enumerate(owners) if whose == owner]
    kinds = [groups[row] for row in own]
    return [own[i] for i in batch_indices(seed, f"{name} {owner}", kinds, number // len(names), size)]


def _rows_from(seed: int, name: str, count: int, start: int) -> Iterator[int]:
    epoch, offset = divmod(start, count)
    while True:
        order = torch.randperm(count, generator=generator(seed, name, epoch)).tolist()
        yield from order[offset:]
        epoch, offset = epoch + 1, 0
