"""Stacks: several chains of a layer as one wide pair, of which each row or position uses its own channels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..deltas import functional
from ..deltas.joining import joined_pair
from .layer import NoraLayer
from .row_banks import Bank, chain, is_plain
from .row_plan import MaskedPlan, RowPlan, RowSpec


class StackBank(Bank):
    """For chains of any basis: ``y += B (m[row] * A x)``, with the pairs of all chains concatenated.

    ``A [K, d_in]``, ``B [d_out, K]``, ``m[row] [K]``: the weight times scaling of a chain that the row uses, else 0. A
    convolution with few output channels costs about as much as one with many, so one for all rows is cheaper than one
    for each subject.
    """

    def add(self, x: Tensor, y: Tensor, *, in_place: bool) -> Tensor:
        down, up, shares = self.rows(y)
        p = self.layer.contract(x.to(y.dtype), down)
        p = self.masked(p * shares.view(len(p), *[1] * (p.ndim - 2), -1))
        return y + self.layer.channels_first(F.linear(p, up)).to(y.dtype)

    def masked(self, p: Tensor) -> Tensor:
        """The stacked ``p [n, ..., K]`` where its chains act: here everywhere."""
        return p

    def build(self, specs: Sequence[RowSpec]) -> tuple[Tensor, ...]:
        pairs = {name: joined_pair([(1.0, self.delta(name))]) for name in self.live()}
        down, up = (torch.cat(factors, dim) for dim, factors in enumerate(zip(*pairs.values(), strict=True)))
        shares = [
            [weight for name, (own, _) in pairs.items() for weight in [self._weight(spec, name)] * len(own)]
            for spec in specs
        ]
        return down, up, down.new_tensor(shares)

    def _weight(self, spec: RowSpec, name: str) -> float:
        return spec.get(name, 0.0) * self.scaling(name)

    def _built(self, y: Tensor) -> tuple[Tensor, ...]:
        with functional.without_autocast(y.device):
            down, up, shares = (factor.to(y.dtype) for factor in self.build(self.plan.used))
            return down, up, shares[self.plan.index(y.device)]


class MaskedBank(StackBank):
    """A stack whose chains act at some positions only: ``y[row, i] += B (m[row] * mask[row, i] * A x[row, i])``."""

    def __init__(self, layer: NoraLayer, names: list[str], plan: MaskedPlan, path: str) -> None:
        super().__init__(layer, names, plan)
        self._mask = partial(plan.mask, path)

    def masked(self, p: Tensor) -> Tensor:
        masks = {name: self._mask(name, p.shape[1:-1]) for name in self.live()}
        if all(mask is None for mask in masks.values()):
            return p
        ranks = [self.delta(name).rank or self.delta(name).full_rank for name in masks]
        parts = zip(p.split(ranks, -1), masks.values(), strict=True)
        return torch.cat([part if mask is None else part * mask.to(part) for part, mask in parts], -1)


def stacks(layer: NoraLayer, names: Sequence[str], plan: RowPlan) -> list[Bank]:
    """The stack of those adapters of a convolution that are chains, if there are several and it is not too wide."""
    if not isinstance(layer.base_layer, nn.Conv2d):
        return []
    chains = [name for name in names if is_plain(layer, name)]
    width = sum(chain(layer, name).rank or chain(layer, name).full_rank for name in chains)
    return [StackBank(layer, chains, plan)] if len(chains) > 1 and width <= layer.base_layer.out_channels else []
