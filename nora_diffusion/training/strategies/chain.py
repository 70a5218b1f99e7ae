"""Chain of LoRA: several pairs, trained one after another."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..hooks.step_hook import StepHook
from ..hooks.trained import Trained


class Chain(StepHook):
    """Chain of LoRA: ``dW = s sum_j B_j A_j``, each pair trained with the earlier ones frozen and a new optimizer.

    The paper merges each link into the weight and starts a new one. Here all links are ranks of one adapter, of which
    only those of the current link are trained, which is the same map: the later ones have ``B_j = 0``, the earlier
    ones keep their values. So the file is one adapter whose rank adds up, and exports exactly. Each link has an equal
    share of the steps. https://arxiv.org/abs/2401.04151
    """

    name = "chain"

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        self.links, self.steps = trained.plan.config.chain_links or 1, trained.plan.config.max_train_steps
        self.kept: list[tuple[Tensor, Tensor]] = []
        """The frozen parts of all factors, and their values before the update."""

    def link(self, step: int) -> int:
        """The link that is trained at a step."""
        return min(step * self.links // self.steps, self.links - 1)

    def before_step(self, step: int) -> None:
        """Start with a new optimizer at the first step of each link."""
        if step > 0 and self.link(step) != self.link(step - 1):
            for factor, _ in self._factors():
                self.trained.optimizer.state.pop(factor, None)

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        """Drop the gradients of the other links, and keep their values, which weight decay would change."""
        link = self.link(step)
        self.kept = []
        for factor, dim in self._factors():
            for part in other_ranks(factor, dim, self.links, link):
                self.kept.append((part, part.clone()))
            for part in () if factor.grad is None else other_ranks(factor.grad, dim, self.links, link):
                part.zero_()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Restore the values of the other links."""
        for part, value in self.kept:
            part.copy_(value)

    def _factors(self) -> Iterator[tuple[nn.Parameter, int]]:
        return (pair for chain in self.trained.chains.values() for pair in chain.factors)


def ranks_of_link(ranks: int, links: int, link: int) -> tuple[int, int]:
    """The first rank of a link, and the first one after it.

    A layer that is smaller than all links together has fewer ranks: they are shared out in equal parts.
    """
    return link * ranks // links, (link + 1) * ranks // links


def other_ranks(factor: Tensor, dim: int, links: int, link: int) -> list[Tensor]:
    """Views of the ranks before and after those of a link; ``dim``: the dimension of the ranks."""
    ranks = factor.shape[dim]
    first, end = ranks_of_link(ranks, links, link)
    return [factor.detach().narrow(dim, 0, first), factor.detach().narrow(dim, end, ranks - end)]
