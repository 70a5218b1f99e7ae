"""Processes that train one stage together, one for each core or GPU, started by ``torchrun``.

Two processes of one thread each are faster than one of two threads: nothing waits for the slower half of an operation.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

_SEEDS_APART = 1000


def join() -> None:
    """Meet the other processes that ``torchrun`` started, if it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def rank() -> int:
    """The number of this process; the first, 0, writes."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def seeds(seed: int) -> list[int]:
    """The seed of every process: each sees scenes of its own."""
    return [seed + _SEEDS_APART * i for i in range(count())]


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process runs the body before the others, which then find the files that it wrote."""
    if count() > 1 and rank() > 0:
        distributed.barrier()
    yield
    if count() > 1 and rank() == 0:
        distributed.barrier()


@torch.no_grad()
def average(gradients: Iterable[Tensor | None]) -> None:
    """Replace gradients by their mean over the processes, in one exchange."""
    present = [g for g in gradients if g is not None]
    if count() == 1 or not present:
        return
    flat = torch.cat([g.flatten() for g in present])
    distributed.all_reduce(flat)
    parts = (flat / count()).split([g.numel() for g in present])
    for g, part in zip(present, parts, strict=True):
        g.copy_(part.view(g.shape))
