"""Random numbers as a function of seed, step and micro-step, so that a resumed run gets the same ones."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice

import torch

from .seeds import derive


def generator(seed: int, *names: object) -> torch.Generator:
    """CPU generator seeded by :func:`.seeds.derive`, so that results do not depend on the model's device."""
    return torch.Generator().manual_seed(derive(seed, *names))


def forked(device: torch.device) -> AbstractContextManager[None]:
    """Restore the global generators of the CPU and ``device`` on exit, without initializing other devices."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device.index or 0], device_type=device.type)


def shuffled_indices(seed: int, name: str, count: int, start: int, size: int) -> list[int]:
    """Items ``start .. start + size`` of endless epochs, each a new permutation of ``count`` indices."""
    return list(islice(_indices_from(seed, name, count, start), size))


def batch_indices(seed: int, name: str, groups: Sequence[Hashable], number: int, size: int) -> list[int]:
    """``size`` indices of batch ``number``, all of one group; index ``i`` belongs to ``groups[i]``.

    An epoch has as many batches as there are indices. Each group gets as many batches as it has indices and cycles
    through its own permutations of them. So all indices are equally frequent, whatever the sizes of the groups.
    """
    count = len(groups)
    if len(set(groups)) == 1:
        return shuffled_indices(seed, name, count, number * size, size)
    epoch, position = divmod(number, count)
    order = torch.randperm(count, generator=generator(seed, name, "groups", epoch)).tolist()
    group = groups[order[position]]
    indices = [i for i in range(count) if groups[i] == group]
    earlier = epoch * len(indices) + sum(groups[i] == group for i in order[:position])
    return [indices[i] for i in shuffled_indices(seed, f"{name} {group}", len(indices), earlier * size, size)]


def balanced_indices(seed: int, name: str, owners: Sequence[Hashable], start: int, size: int) -> list[int]:
    """Items ``start .. start + size`` of endless rounds in which every owner comes once, in a new order each time.

    Index ``i`` belongs to ``owners[i]``; each owner cycles through its own permutations of its indices.
    """
    names = list(dict.fromkeys(owners))
    found = []
    for position, turn in enumerate(shuffled_indices(seed, f"{name} owners", len(names), start, size), start):
        own = [i for i, owner in enumerate(owners) if owner == names[turn]]
        found.append(own[shuffled_indices(seed, f"{name} {names[turn]}", len(own), position // len(names), 1)[0]])
    return found


def owned_indices(
    seed: int, name: str, owners: Sequence[Hashable], groups: Sequence[Hashable], number: int, size: int
) -> list[int]:
    """``size`` indices of batch ``number``, all of one owner and one group; owners take turns batch by batch.

    Index ``i`` belongs to ``owners[i]`` and ``groups[i]``; an owner's batches are those of :func:`batch_indices`.
    """
    names = list(dict.fromkeys(owners))
    owner = names[shuffled_indices(seed, f"{name} owners", len(names), number, 1)[0]]
    own = [i for i, other in enumerate(owners) if other == owner]
    own_groups = [groups[i] for i in own]
    return [own[i] for i in batch_indices(seed, f"{name} {owner}", own_groups, number // len(names), size)]


def _indices_from(seed: int, name: str, count: int, start: int) -> Iterator[int]:
    epoch, offset = divmod(start, count)
    while True:
        order = torch.randperm(count, generator=generator(seed, name, epoch)).tolist()
        yield from order[offset:]
        epoch, offset = epoch + 1, 0
