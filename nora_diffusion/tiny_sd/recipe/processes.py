"""Data-parallel training with one process per core or GPU, started by ``torchrun``.

On a CPU, two processes of one thread each are faster than one process of two threads: fewer synchronization points.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

_SEED_STRIDE = 1000


def init() -> None:
    """Initialize the process group; a no-op without ``torchrun``."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def rank() -> int:
    """The rank of this process. Only rank 0 writes files."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def seeds(seed: int) -> list[int]:
    """The seed of each rank, so that every process draws its own scenes."""
    return [seed + _SEED_STRIDE * i for i in range(world_size())]


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run the body on rank 0 first; the other ranks then find the files it wrote."""
    if world_size() > 1 and rank() > 0:
        distributed.barrier()
    yield
    if world_size() > 1 and rank() == 0:
        distributed.barrier()


@torch.no_grad()
def average(gradients: Iterable[Tensor | None]) -> None:
    """All-reduce the mean gradients in one flat buffer, in place."""
    present = [g for g in gradients if g is not None]
    if world_size() == 1 or not present:
        return
    flat = torch.cat([g.flatten() for g in present])
    distributed.all_reduce(flat)
    means = (flat / world_size()).split([g.numel() for g in present])
    for g, mean in zip(present, means, strict=True):
        g.copy_(mean.view(g.shape))
