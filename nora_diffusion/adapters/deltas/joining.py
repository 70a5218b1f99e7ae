"""Several chains of one projection as a single LoRA pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import functional
from .chain import ChainDelta

ScaledChain = tuple[float, ChainDelta]
Pair = tuple[Tensor, Tensor]


def joined_pair(chains: Sequence[ScaledChain]) -> Pair:
    """``(A [K, d_in], B [d_out, K])`` with ``B A = sum_k s_k B_k A_k``, at least in fp32.

    Chains that share a frozen ``A_out`` are joined behind it by :func:`joined_behind_input`, all others are
    concatenated. So ``K`` is at most the outer rank ``r`` for any number of subjects in one basis.
    """
    pairs = []
    for group in functional.groups(chains, lambda one, two: shared_sides(one[1], two[1]) > 0):
        if len(group) > 1:
            lower, upper = joined_behind_input(group)
            pairs.append((lower @ functional.at_least_single(group[0][1].outer[0]), upper))
        else:
            scale, (down, up) = group[0][0], group[0][1].pair()
            pairs.append((functional.at_least_single(down), scale * functional.at_least_single(up)))
    return concatenated(pairs)


def joined_behind_input(chains: Sequence[ScaledChain]) -> Pair:
    """``(L [K, r], U [d_out, K])`` with ``U L A_out = sum_k s_k dW_k``, for chains with one frozen ``A_out [r, d_in]``.

    Their inner pairs are concatenated until the ranks add up to more than ``r``. Then they are summed: ``L`` is the
    identity and ``U = sum_k s_k U_k C_k``, in the core where they share ``B_out`` too.
    """
    r = len(chains[0][1].outer[0])
    if sum(chain.full_rank for _, chain in chains) <= r:
        return concatenated([_inner_pair(scale, chain) for scale, chain in chains])
    total: Tensor | None = None
    for group in functional.groups(chains, lambda one, two: shared_sides(one[1], two[1]) == 2):
        core = torch.stack([scale * core_matrix(chain) for scale, chain in group]).sum(0)
        product = functional.at_least_single(group[0][1].outer[1]) @ core
        total = product if total is None else total + product
    assert total is not None
    return torch.eye(r, dtype=total.dtype, device=total.device), total


def concatenated(pairs: Sequence[Pair]) -> Pair:
    """``([A_1; A_2; ...], [B_1, B_2, ...])``: the pair of the sum of several pairs."""
    return torch.cat([down for down, _ in pairs]), torch.cat([up for _, up in pairs], dim=1)


def _inner_pair(scale: float, chain: ChainDelta) -> Pair:
    lower, upper = chain.core_pair()
    up = functional.at_least_single(chain.outer[1])
    up = up if upper is None else up @ functional.at_least_single(upper)
    return functional.at_least_single(lower), scale * up


def core_matrix(chain: ChainDelta) -> Tensor:
    """The core of a chain as a matrix ``[r, r]`` (``[r', r]`` of an input core), at least in fp32."""
    return functional.core_product(*chain.core_pair())


def shared_sides(one: ChainDelta, two: ChainDelta, *, by_value: bool = False) -> int:
    """How many frozen outer factors two chains at full rank share, from the input on: 0, 1 (``A_out``) or 2.

    They share a factor if it is the same tensor, or (``by_value``) if it has the same values.
    """
    if any(chain.core is None or chain.rank is not None for chain in (one, two)):
        return 0
    frozen = min(one.frozen_sides, two.frozen_sides)
    pairs = list(zip(one.outer[:frozen], two.outer[:frozen], strict=True))
    equal = [_is_same(a, b) or (by_value and _is_equal(a, b)) for a, b in pairs]
    return sum(equal) if equal[:1] == [True] else 0


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.dtype == b.dtype)


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
