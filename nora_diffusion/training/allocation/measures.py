"""Measures: what is observed in each step, and the scores that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks.trained import RankedChain
from . import scores
from .ranks import Ranks
from .schedules import beam_interval

INPUT_DECAY = 0.9
"""Of the mean input norms of PRILoRA."""
SHARE_DECAY = 0.9
"""Of the mean norm shares of DoRA with dynamic rank, as in its published code."""
Scores = Sequence[Tensor]
"""One tensor for each layer."""


def nothing(ranks: Ranks, step: int) -> None:
    """Observe nothing."""


@contextmanager
def unobserved(ranks: Ranks) -> Iterator[None]:
    """Observe nothing of a pass."""
    yield


@dataclass(frozen=True)
class Measure:
    """``scores(ranks)``: at a decision, a score for each rank, weight or layer; by layer.

    ``observe(ranks, step)``: called with the gradients of each step. ``around(ranks)``: a context around each pass, for
    inputs of layers, which other subjects must not share.
    """

    scores: Callable[[Ranks], Scores]
    observe: Callable[[Ranks, int], None] = nothing
    around: Callable[[Ranks], Any] | None = None


def observe_sensitivity(ranks: Ranks, step: int) -> None:
    """Update AdaLoRA's statistics."""
    means, spreads = ranks.of_weights("means"), ranks.of_weights("spreads")
    scores.update_sensitivity(means, spreads, ranks.weights, ranks.gradients)


def triplets(ranks: Ranks) -> Scores:
    """AdaLoRA's scores: mean times spread of each weight, summed over each triplet."""
    products = torch._foreach_mul(ranks.of_weights("means"), ranks.of_weights("spreads"))
    # By chain: down, up, scales.
    return [scores.triplet_scores(s, up, down) for down, up, s in zip(*[iter(products)] * 3, strict=True)]


def observe_shares(ranks: Ranks, step: int) -> None:
    """Update the mean norm share of each rank."""
    now = torch.cat([scores.norm_shares(*chain.delta.pair()) for chain in ranks.chains])
    if "shares" not in ranks.memory:
        ranks.memory["shares"] = torch.zeros_like(now)
    ranks.memory["shares"].lerp_(now, 1 - SHARE_DECAY)


def shares(ranks: Ranks) -> Scores:
    """The mean norm share of each rank."""
    return ranks.of_ranks(ranks.memory["shares"])


def observe_gradients(ranks: Ranks, step: int) -> None:
    """Add up the squared gradient norm of each layer's up factor: layers that are off have a gradient there too."""
    ups = [chain.up for chain in ranks.chains]
    norms = torch.stack(torch._foreach_norm([torch.zeros_like(up) if up.grad is None else up.grad for up in ups]))
    ranks.memory["gradients"] = ranks.memory.get("gradients", torch.zeros_like(norms)) + norms.square()


def gradient_norms(ranks: Ranks) -> Scores:
    """The squared gradient norm of each layer since the last decision."""
    return list(ranks.memory.pop("gradients"))


def observe_beam(ranks: Ranks, step: int) -> None:
    """Remember the factors halfway to the next decision: copies start from there, so that they differ."""
    interval = beam_interval(ranks.steps)
    if step % interval == interval - max(1, interval // 2):
        ranks.memory["halfway"] = torch.cat([factor.detach().flatten() for factor in ranks.weights])


def rank_weights(ranks: Ranks) -> Scores:
    """The weight of each rank, a softmax over the ranks of its layer."""
    found = [chain.delta.rank_weights() for chain in ranks.chains]
    return [weights for weights in found if weights is not None]


@contextmanager
def input_norms(ranks: Ranks) -> Iterator[None]:
    """Add up the mean squares of the inputs of each lower factor during a pass."""
    if "inputs" not in ranks.memory:
        widths = [chain.down.shape[1] for chain in ranks.chains]
        ranks.memory["inputs"] = ranks.weights[0].new_zeros(sum(widths))
        ranks.memory["passes"] = torch.zeros(())
    parts = _by_input(ranks, "inputs")
    with ExitStack() as stack:
        for chain, part in zip(ranks.chains, parts, strict=True):
            stack.callback(chain.layer.register_forward_pre_hook(partial(_add_squares, chain, part)).remove)
        yield
    ranks.memory["passes"] += 1


@torch.no_grad()
def _add_squares(chain: RankedChain, part: Tensor, _: nn.Module, args: tuple[Any, ...]) -> None:
    """Add the mean square of each input of the lower factor. Of a convolution, all places of a kernel share it."""
    x, channels = args[0], 1 if isinstance(chain.layer.base_layer, nn.Conv2d) else -1
    if chain.delta.core is not None:
        x, channels = chain.layer.contract(x, chain.delta.stored_outer[0]), -1
    dims = [dim for dim in range(x.ndim) if dim != channels % x.ndim]
    dtype = torch.promote_types(x.dtype, torch.float32)
    squares = torch.linalg.vector_norm(x, dim=dims, dtype=dtype).square() * (x.shape[channels] / x.numel())
    part += squares.repeat_interleave(len(part) // len(squares))


def _by_input(ranks: Ranks, name: str) -> Sequence[Tensor]:
    return ranks.memory[name].split([chain.down.shape[1] for chain in ranks.chains])


def observe_inputs(ranks: Ranks, step: int) -> None:
    """Update the mean norm of each input from the passes of this step."""
    norms = ranks.average(ranks.memory.pop("inputs") / ranks.memory.pop("passes")).sqrt()
    if "norms" not in ranks.memory:
        ranks.memory["norms"] = torch.zeros_like(norms)
    ranks.memory["norms"].lerp_(norms, 1 - INPUT_DECAY)


def input_weighted(ranks: Ranks) -> Scores:
    """The score of each weight of each lower factor."""
    norms = _by_input(ranks, "norms")
    return [scores.input_weighted(chain.down.detach(), own) for chain, own in zip(ranks.chains, norms, strict=True)]
