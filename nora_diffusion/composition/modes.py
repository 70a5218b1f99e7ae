"""Mix modes: plain functions ``(updates, weights, options) -> Mixed`` for the updates of one projection.

To add a mode, add a function to :data:`MODES`. ``linear`` and ``cat`` are exact, the others are truncated to
``options.rank`` and report the lost energy. ``docs/mixing.md`` compares them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..adapters.deltas import functional
from ..adapters.deltas.bases import Pair, truncated_svd
from ..errors import UserError
from ..generation.settings import MAX_SEED, check_range
from .updates import Update

Mode = Literal["linear", "cat", "svd", "magnitude_prune", "ties", "dare_linear", "dare_ties"]


@dataclass(frozen=True)
class Options:
    """Settings of the modes: ``rank`` of the result (default: the sum of all ranks), ``density`` (the share of entries
    that pruning keeps) and the ``seed`` of DARE's random drops."""

    rank: int | None = None
    density: float = 0.5
    seed: int = 0

    def check(self) -> None:
        """Raises :class:`UserError` for a value out of range."""
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank={self.rank} is not a rank: give a whole number of at least 1")
        if not 0 < self.density <= 1:
            raise UserError(f"density={self.density} is out of range: choose more than 0 and at most 1")
        check_range("seed", self.seed, 0, MAX_SEED)


@dataclass(frozen=True)
class Mixed:
    """One projection's mix, the energy ``||dW||_F^2`` of the mode's formula, and the energy lost by truncation."""

    update: Update
    energy: float = 0.0
    lost: float = 0.0


def linear(updates: Sequence[Update], weights: Sequence[float], options: Options) -> Mixed:
    """``dW = B_out (sum_i w_i B_i A_i) A_out``: the sum of the cores inside one shared basis, exact.

    If only ``A_out`` is shared (one-sided NoRA), ``dW = [w_1 B_1, w_2 B_2 ...] [A_1; A_2; ...] A_out``. The inner pairs
    are stacked: the inner ranks add up, to at most the outer rank ``r``. Raises :class:`UserError` for updates without
    a common frozen ``A_out``.
    """
    first = updates[0]
    sides = min(first.shared_sides(update) for update in updates)
    if sides == 0:
        raise UserError(
            "mode 'linear' sums cores inside one basis, but these adapters have no frozen basis in common: "
            "use 'cat' (exact, the ranks add up) or 'svd' (truncated to a rank)"
        )
    if sides == 1:
        down, up = _stacked([update.behind_input() for update in updates], weights)
        return Mixed(Update(first.down, up, (down, None)))
    return Mixed(Update(first.down, first.up, _stacked([cast(Pair, update.core) for update in updates], weights)))


def cat(updates: Sequence[Update], weights: Sequence[float], options: Options) -> Mixed:
    """``dW = sum_i w_i B_i A_i = [w_1 B_1, w_2 B_2 ...] [A_1; A_2; ...]``: exact, the ranks add up."""
    return Mixed(Update(*_stacked([update.pair() for update in updates], weights)))


def svd(updates: Sequence[Update], weights: Sequence[float], options: Options) -> Mixed:
    """The best approximation of ``sum_i w_i dW_i`` of rank ``options.rank`` in the Frobenius norm.

    Uses a QR of the stacked factors, so the dense sum is never formed. The lost energy is that of the discarded
    singular values.
    """
    u, s, v = functional.product_svd(*_stacked([update.pair() for update in updates], weights))
    rank = min(_rank(updates, options), len(s))
    root = s[:rank].sqrt()
    truncated = Update((v[:, :rank] * root).T, u[:, :rank] * root)
    return Mixed(truncated, float(s.square().sum()), float(s[rank:].square().sum()))


def magnitude_prune(updates: Sequence[Update], weights: Sequence[float], options: Options) -> Mixed:
    """``dW = sum_i w_i top(dW_i)``: ``top`` keeps the share ``density`` of entries with the largest magnitudes."""
    return _pruned("magnitude_prune", updates, weights, options)


def ties(updates: Sequence[Update], weights: Sequence[float], options: Options) -> Mixed:
    """TIES (arXiv 2306.01708): prune each ``dW_i`` by magnitude, elect a sign per entry, average those that agree.

    ``dW = sum_i w_i m_i top(dW_i) / max(1, sum_i m_i)``, ``m_i = [sign(top(dW_i)) = sign(sum_j top(dW_j))]`` per entry.
    This is an average: two updates that agree give their mean at weight 1, not their sum.
    """
    return _pruned("ties", updates, weights, options)


def dare_linear(updates: Sequence[Update], weights: Sequence[float], options: Options) -> Mixed:
    """DARE (arXiv 2311.03099): ``dW = sum_i w_i drop(dW_i) / density``, ``drop`` keeps entries at random, by seed."""
    return _pruned("dare_linear", updates, weights, options)


def dare_ties(updates: Sequence[Update], weights: Sequence[float], options: Options) -> Mixed:
    """TIES with DARE's random pruning and rescaling instead of pruning by magnitude."""
    return _pruned("dare_ties", updates, weights, options)


MixFunction = Callable[[Sequence[Update], Sequence[float], Options], Mixed]
MODES: dict[Mode, MixFunction] = {
    "linear": linear,
    "cat": cat,
    "svd": svd,
    "magnitude_prune": magnitude_prune,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
}


def _stacked(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """The pair ``([A_1; A_2; ...], [w_1 B_1, w_2 B_2, ...])`` of a weighted sum of pairs ``(A_i, B_i)``."""
    up = torch.cat([weight * up for weight, (_, up) in zip(weights, pairs, strict=True)], 1)
    return torch.cat([down for down, _ in pairs]), up


def _rank(updates: Sequence[Update], options: Options) -> int:
    rank = sum(update.rank for update in updates) if options.rank is None else options.rank
    return min(rank, *updates[0].shape)


def _pruned(name: str, updates: Sequence[Update], weights: Sequence[float], options: Options) -> Mixed:
    """PEFT's merge function on dense updates, truncated to ``options.rank``; the lost energy is measured densely."""
    from peft.utils import merge_utils

    merge: Any = getattr(merge_utils, name)
    dense = [update.dense().float() for update in updates]
    # PEFT draws from the global CPU generator.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density")  # density 1 prunes nothing, as asked
        torch.manual_seed(options.seed)
        target: Tensor = merge(dense, torch.tensor(weights, dtype=torch.float32), density=options.density)
    u, s, vt = truncated_svd(target, _rank(updates, options))
    truncated = Update(s.sqrt().unsqueeze(1) * vt, u * s.sqrt())
    lost = (target.double() - truncated.dense()).square().sum()
    return Mixed(truncated, float(target.double().square().sum()), float(lost))
