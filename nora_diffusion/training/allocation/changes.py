"""Changes: rules applied to the factors, the scales and the optimizer's state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import rules
from .measures import Scores
from .ranks import Ranks

Value = float


def random_pairs(ranks: Ranks) -> None:
    """Start from random pairs whose ranks have the scale 0: columns of ``P`` and rows of ``Q`` of norm about 1."""
    for layer, chain in zip(ranks.layers, ranks.chains, strict=True):
        for name, factor, length in (("down", chain.down, chain.down.shape[1]), ("up", chain.up, len(chain.up))):
            factor.copy_(ranks.draw(factor.shape, name, *layer).mul_(math.sqrt(3 / length)))
        assert chain.scales is not None
        chain.scales.zero_()


def mask_to_budget(ranks: Ranks, scores: Scores, excess: Value) -> None:
    """Set the scales of all but the best ranks of the adapter to 0; with the final budget, clear these for good."""
    least, most = sum(ranks.means), sum(ranks.counts)
    kept = rules.best(torch.cat(list(scores)), least + int(excess * (most - least)))
    if excess == 0:
        ranks.clear(ranks.of_ranks(~kept))
        return
    for chain, own in zip(ranks.chains, ranks.of_ranks(kept), strict=True):
        assert chain.scales is not None
        chain.scales.mul_(own)


def zero_lowest_half(ranks: Ranks, scores: Scores, _: Value) -> None:
    """Set the lowest half of each row of each lower factor to 0; training may bring these weights back."""
    for chain, own in zip(ranks.chains, scores, strict=True):
        chain.down.masked_fill_(rules.lowest_half(own), 0.0)


def switch_layers(ranks: Ranks, scores: Scores, _: Value) -> None:
    """Switch the best half of the layers on and the others off: these add nothing and are not trained."""
    on = rules.best(torch.stack(list(scores)), (len(scores) + 1) // 2)
    for chain, stays in zip(ranks.chains, on.tolist(), strict=True):
        if not stays and chain.up.any():
            chain.up.zero_()
            chain.forget(torch.arange(chain.ranks, device=chain.up.device), ranks.optimizer)
    ranks.memory["on"] = on


def hold_off_layers(ranks: Ranks) -> None:
    """Drop the gradients of layers that are off."""
    if "on" in ranks.memory:
        for chain, is_on in zip(ranks.chains, ranks.memory["on"].tolist(), strict=True):
            if not is_on:
                chain.delta.zero_grad(set_to_none=True)


def copy_best(ranks: Ranks, scores: Scores, mass: Value) -> None:
    """Replace the ranks of each layer beyond ``mass`` by its best ones, as these were halfway, with their moments.

    Both then have the mean of the two scores, whose moments are 0. https://arxiv.org/abs/2502.13604
    """
    halfway = ranks.of_weights("halfway")
    for number, (chain, own) in enumerate(zip(ranks.chains, scores, strict=True)):
        weak = rules.beyond_mass(own, mass)
        strong = own.argsort(descending=True, stable=True)[: len(weak)]
        if not len(weak):
            continue
        assert chain.scales is not None
        for (factor, dim), earlier in zip(chain.factors[:2], halfway[3 * number : 3 * number + 2], strict=True):
            for tensor, source in ((factor, earlier), *((x, x) for x in _moments(ranks, factor))):
                tensor.index_copy_(dim, weak, source.index_select(dim, strong))
        mean = (chain.scales[weak] + chain.scales[strong]) / 2
        chain.scales[weak] = mean
        chain.scales[strong] = mean
        for moment in _moments(ranks, chain.scales):
            moment.zero_()


def _moments(ranks: Ranks, factor: Tensor) -> list[Tensor]:
    state = ranks.optimizer.state.get(factor, {})
    return [entry for entry in state.values() if isinstance(entry, Tensor) and entry.shape == factor.shape]
