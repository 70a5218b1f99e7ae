"""ALoRA: ranks are ablated one by one, and layers hand over the budget of those that are worth least.

Each layer has room for twice its mean rank. Ranks that are not in use are 0 in all factors. The scores of all ranks
would cost two forward passes for each rank of each layer, thousands. So only those that may be the worst are ablated:
twice as many as are pruned, of the smallest norm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import rules, scores
from .measures import Scores
from .ranks import Ranks

PRUNED = 0.01
"""Share of the budget that each decision moves."""
CANDIDATES = 2
"""Ablated ranks for each pruned one."""


def leave_room(ranks: Ranks) -> None:
    """Start with the mean rank in each layer; the others are room."""
    used = [torch.arange(count) < mean for count, mean in zip(ranks.counts, ranks.means, strict=True)]
    ranks.memory["used"] = torch.cat(used).to(ranks.weights[0].device)
    ranks.clear(ranks.of_ranks(~ranks.memory["used"]))


def moved(ranks: Ranks) -> int:
    """How many ranks a decision moves."""
    return max(1, int(PRUNED * sum(ranks.means)))


def ablated(ranks: Ranks) -> Scores:
    """The score of each candidate by ablation, infinity for all other ranks. All losses are of one batch.

    ``1 + 2 n`` forward passes for ``n`` candidates.
    """
    used, norms = ranks.memory["used"], torch.cat(_norms(ranks))
    count = min(CANDIDATES * moved(ranks), int(used.sum()))
    candidates = norms.masked_fill(~used, math.inf).argsort(stable=True)[:count].tolist()
    found = torch.full(norms.shape, math.inf, device=norms.device)
    whole, ups = _loss(ranks), [chain.up.clone() for chain in ranks.chains]
    without = {index: _with_columns(ranks, ups, index, off=True) for index in candidates}
    for chain in ranks.chains:
        chain.up.zero_()
    for index in candidates:
        alone = _with_columns(ranks, ups, index, off=False)
        found[index] = scores.ablation(whole, without[index], alone)
    for chain, up in zip(ranks.chains, ups, strict=True):
        chain.up.copy_(up)
    return ranks.of_ranks(found)


def _norms(ranks: Ranks) -> list[Tensor]:
    """``||dW_i||_F`` of each rank, by layer."""
    pairs = [chain.delta.pair() for chain in ranks.chains]
    return [ranks_norm(down, up) * abs(chain.scale) for chain, (down, up) in zip(ranks.chains, pairs, strict=True)]


def ranks_norm(down: Tensor, up: Tensor) -> Tensor:
    """``||b_i||_2 ||a_i||_2`` ``[k]``."""
    return up.norm(dim=0) * down.norm(dim=1)


def _with_columns(ranks: Ranks, ups: list[Tensor], index: int, off: bool) -> float:
    """The loss while one rank is off, or on, and all others stay as they are."""
    layer = 0
    while index >= ranks.counts[layer]:
        index, layer = index - ranks.counts[layer], layer + 1
    up, own = ranks.chains[layer].up, ups[layer][:, index]
    up[:, index] = torch.zeros_like(own) if off else own
    loss = _loss(ranks)
    up[:, index] = own if off else torch.zeros_like(own)
    return loss


def _loss(ranks: Ranks) -> float:
    number = int(ranks.memory.get("decided", torch.zeros(())))
    return float(ranks.average(ranks.trained.loss_of(number).detach().double()))


def hand_over(ranks: Ranks, values: Scores, _: float) -> None:
    """Prune the worst ranks; layers that lost none get as many new ones, those with the largest ranks first.

    A new rank starts like a new LoRA: random below, 0 above.
    """
    used = ranks.memory["used"]
    pruned = rules.best(-torch.cat(list(values)), moved(ranks)) & used
    ranks.clear(ranks.of_ranks(pruned))
    used &= ~pruned
    lost = [int(own.sum()) for own in ranks.of_ranks(pruned)]
    room = [int((~own).sum()) for own in ranks.of_ranks(used)]
    worth = [
        float(norms.sum() / own.sum().clamp(min=1))
        for norms, own in zip(_norms(ranks), ranks.of_ranks(used), strict=True)
    ]
    gained = rules.handed_over(lost, room, worth, sum(lost))
    for layer, chain, own, count in zip(ranks.layers, ranks.chains, ranks.of_ranks(used), gained, strict=True):
        new = (~own).nonzero().flatten()[:count]
        if count:
            bound = 1 / math.sqrt(chain.down.shape[1])
            chain.down[new] = bound * ranks.draw((count, chain.down.shape[1]), int(ranks.memory["decided"]), *layer)
            own[new] = True
