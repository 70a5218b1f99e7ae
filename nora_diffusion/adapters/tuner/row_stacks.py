"""Banks of convolutions. Stacks: several chains as one wide pair, of which each row or position uses its own channels;
folds: one pair for each row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..deltas import functional
from ..deltas.joining import joined_pair
from .layer import NoraLayer
from .row_banks import Bank, PairBank, chain, is_plain, similar_chains
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


class FoldBank(PairBank):
    """For chains of any basis in a convolution of stride 1: ``y += B[row] fold(A[row] x)``, one pair for each row.

    ``A[row]`` maps the channels of a position to ``K kh kw`` values, of which each output position adds up those of its
    neighbors. So it is a product of matrices: a convolution with few output channels costs about as much as one with
    many, and a gradient of its weight too.
    """

    def add(self, x: Tensor, y: Tensor, *, in_place: bool) -> Tensor:
        downs, ups = self.rows(y)
        taps = functional.rowwise(x.to(y.dtype).movedim(1, -1), downs).flatten(1, 2).transpose(1, 2)
        kernel, dilation = _ints(self._conv.kernel_size), _ints(self._conv.dilation)
        shape = (y.shape[2], y.shape[3])
        p = F.fold(functional.at_least_single(taps), shape, kernel, dilation, _fold_padding(self._conv))
        dy = functional.rowwise(p.to(y.dtype).movedim(1, -1), ups)
        return y + self.layer.channels_first(dy)

    def build(self, specs: Sequence[RowSpec]) -> tuple[Tensor, ...]:
        downs, ups = super().build(specs)  # [n, C kh kw, K], [n, K, d_out]
        kernel = _ints(self._conv.kernel_size)
        taps = downs.unflatten(1, (-1, *kernel)).flip(2, 3)  # the value of tap k is added at a distance of minus k
        return taps.movedim(-1, 2).flatten(2), ups

    @property
    def _conv(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.layer.base_layer)


def _ints(values: Sequence[int]) -> tuple[int, int]:
    return values[0], values[1]


def _fold_padding(conv: nn.Conv2d) -> tuple[int, int]:
    """The padding of the fold that sums the taps of a convolution; negative if there is no such fold."""
    if isinstance(conv.padding, str) or _ints(conv.stride) != (1, 1):
        return -1, -1
    first, second = (d * (k - 1) - p for d, k, p in zip(conv.dilation, conv.kernel_size, conv.padding, strict=True))
    return first, second


def conv_banks(layer: NoraLayer, names: Sequence[str], plan: RowPlan) -> list[Bank]:
    """The banks of those adapters of a convolution that are chains, if there are several.

    In training a fold for each group of similar rank, where there is one; else a stack, if it is not too wide.
    """
    conv = layer.base_layer
    if not isinstance(conv, nn.Conv2d):
        return []
    if torch.is_grad_enabled() and min(_fold_padding(conv)) >= 0:
        return [FoldBank(layer, group, plan) for group in similar_chains(layer, names)]
    chains = [name for name in names if is_plain(layer, name)]
    width = sum(chain(layer, name).rank or chain(layer, name).full_rank for name in chains)
    return [StackBank(layer, chains, plan)] if len(chains) > 1 and width <= conv.out_channels else []
