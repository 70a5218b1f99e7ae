"""Several chains of one projection as a single LoRA pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import functional
from .chain import ChainDelta

ScaledChain = tuple[float, ChainDelta]


def joined_pair(chains: Sequence[ScaledChain]) -> tuple[Tensor, Tensor]:
    """``(A [K, d_in], B [d_out, K])`` with ``B A = sum_k s_k B_k A_k``, at least in fp32.

    Chains that share a frozen outer pair of rank ``r`` are summed in its core, ``B = U sum_k s_k C_k``, ``A = D``, once
    their ranks add up to more than ``r``; all others are concatenated. So ``K`` is at most ``r`` for any number of
    subjects in one basis.
    """
    downs, ups = [], []
    for group in functional.groups(chains, lambda one, two: shares_basis(one[1], two[1])):
        if len(group) > 1 and sum(chain.full_rank for _, chain in group) > len(group[0][1].outer[0]):
            pairs = [_sum_in_core(group)]
        else:
            pairs = [(down, scale * up) for scale, chain in group for down, up in [_exact_pair(chain)]]
        downs += [down for down, _ in pairs]
        ups += [up for _, up in pairs]
    return torch.cat(downs), torch.cat(ups, dim=1)


def core_matrix(chain: ChainDelta) -> Tensor:
    """The core of a chain as a matrix ``[r, r]``, at least in fp32."""
    assert chain.core is not None
    return functional.core_product(*chain.core.pair())


def shares_basis(one: ChainDelta, two: ChainDelta, *, by_value: bool = False) -> bool:
    """Whether two chains at full rank have cores inside the same frozen outer tensors, or (``by_value``) equal ones."""
    if any(c.core is None or c.rank is not None or any(f.requires_grad for f in c.outer) for c in (one, two)):
        return False
    return all(_is_same(a, b) or (by_value and _is_equal(a, b)) for a, b in zip(one.outer, two.outer, strict=True))


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.dtype == b.dtype)


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _sum_in_core(group: Sequence[ScaledChain]) -> tuple[Tensor, Tensor]:
    down, up = (functional.at_least_single(factor) for factor in group[0][1].outer)
    core = torch.stack([scale * core_matrix(chain) for scale, chain in group]).sum(0)
    return down, up @ core


def _exact_pair(chain: ChainDelta) -> tuple[Tensor, Tensor]:
    down, up = chain.pair()
    return functional.at_least_single(down), functional.at_least_single(up)
