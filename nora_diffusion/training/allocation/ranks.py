"""The ranks of an adapter in training, as scores and rules see them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..hooks.trained import Layer, RankedChain, Trained
from ..step.randomness import generator


@dataclass
class Ranks:
    """The chains of an adapter, and what is remembered from step to step.

    ``memory``: tensors by name, which checkpoints hold; most have one entry for each rank of all layers or for each
    weight, and :meth:`of_ranks` and :meth:`of_weights` cut them by layer.
    """

    trained: Trained
    memory: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def layers(self) -> list[Layer]:
        """Component and path of each layer."""
        return list(self.trained.chains)

    @cached_property
    def chains(self) -> list[RankedChain]:
        """The chain of each layer."""
        return list(self.trained.chains.values())

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the run."""
        return self.trained.optimizer

    @property
    def steps(self) -> int:
        """The steps of the run."""
        return self.trained.plan.config.max_train_steps

    @cached_property
    def counts(self) -> list[int]:
        """The ranks of each layer that are allocated in memory."""
        return [chain.ranks for chain in self.chains]

    @cached_property
    def means(self) -> list[int]:
        """The ranks that each layer would have if all had the mean rank of the settings."""
        config = self.trained.plan.config
        nested = self.trained.plan.adapter.has_inner_rank
        wanted = config.inner_rank if nested else config.rank
        assert wanted is not None
        return [min(wanted, count) for count in self.counts]

    @cached_property
    def weights(self) -> list[Tensor]:
        """The factors of all chains, in one order."""
        return [factor for chain in self.chains for factor, _ in chain.factors]

    @property
    def gradients(self) -> list[Tensor]:
        """Their gradients; 0 where a parameter has none in this step."""
        return [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in self.weights]

    @cached_property
    def groups(self) -> list[list[RankedChain]]:
        """The chains, those with factors of the same shapes together."""
        found: dict[tuple[torch.Size, torch.Size], list[RankedChain]] = {}
        for chain in self.chains:
            found.setdefault((chain.down.shape, chain.up.shape), []).append(chain)
        return list(found.values())

    def of_ranks(self, flat: Tensor) -> Sequence[Tensor]:
        """A tensor with an entry for each rank, cut by layer."""
        return flat.split(self.counts)

    def of_weights(self, name: str) -> list[Tensor]:
        """What is remembered of each weight under ``name``, 0 at first, in the order and shapes of :attr:`weights`."""
        sizes = [weight.numel() for weight in self.weights]
        if name not in self.memory:
            self.memory[name] = self.weights[0].new_zeros(sum(sizes))
        cut = self.memory[name].split(sizes)
        return [part.view(weight.shape) for part, weight in zip(cut, self.weights, strict=True)]

    def draw(self, shape: Sequence[int], *names: object) -> Tensor:
        """Uniform random numbers in [-1, 1) that depend on the run's seed and ``names`` only."""
        source = generator(self.trained.plan.config.seed, "ranks", *names)
        return (2 * torch.rand(*shape, generator=source) - 1).to(self.weights[0])

    def average(self, value: Tensor) -> Tensor:
        """The mean over the processes."""
        if self.trained.plan.processes > 1:
            torch.distributed.all_reduce(value)
            value /= self.trained.plan.processes
        return value

    def clear(self, pruned: Iterable[Tensor]) -> None:
        """Clear the ranks of each layer for which its mask is true."""
        for chain, mask in zip(self.chains, pruned, strict=True):
            chain.clear(mask.nonzero().flatten(), self.optimizer)
