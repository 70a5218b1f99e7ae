"""Banks: the factors of several chains of one layer, stacked, so that each row of a batch is multiplied by its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..deltas import functional
from ..deltas.chain import ChainDelta
from ..deltas.factor_state import FactorState, versions
from ..deltas.joining import Pair, ScaledChain, core_matrix, joined_behind_input, joined_pair, shared_sides
from .layer import NoraLayer
from .row_plan import RowPlan, RowSpec

Weights = tuple[tuple[str, float], ...]
"""The adapters of a row with their weights."""
Comparison = tuple[object, int]
_COMPARED: WeakKeyDictionary[ChainDelta, WeakKeyDictionary[ChainDelta, Comparison]] = WeakKeyDictionary()
"""How many equal frozen factors two chains have, with the state of these factors."""


class Bank(ABC):
    """Factors of several chains, one set for each row of the batch.

    Only the specs of the batch are stacked: of many subjects that train together, a pass may have two.
    """

    def __init__(self, layer: NoraLayer, names: list[str], plan: RowPlan) -> None:
        self.layer, self.names, self.plan = layer, names, plan
        self._checked = -1
        self._seen: object = None
        self._rows: tuple[Tensor, ...] = ()
        self._factors: defaultdict[str, FactorState] = defaultdict(FactorState)
        self._states: dict[str, object] = {}
        """Of each chain that the batch uses: changes with its scale, rank and factors."""

    @abstractmethod
    def add(self, x: Tensor, y: Tensor, *, in_place: bool) -> Tensor:
        """``y`` plus the chains' part of each row, for the input ``x``; ``in_place``: ``y`` may be overwritten."""

    @abstractmethod
    def build(self, specs: Sequence[RowSpec]) -> tuple[Tensor, ...]:
        """The factors of these specs, stacked; at least one spec uses a chain of this bank."""

    def is_used(self) -> bool:
        """Whether any row of the batch uses a chain of this bank."""
        return not self.plan.live.isdisjoint(self.names)

    def rows(self, y: Tensor) -> tuple[Tensor, ...]:
        """The factors of each row, or of each block of rows with the same ones, in the dtype of ``y``.

        They are kept until the batch or a factor changes; under autograd every pass builds them.
        """
        if torch.is_grad_enabled():
            return self._built(y)
        if not torch.compiler.is_compiling():  # a graph that reads the number of the pass would serve one pass only
            self.refresh()
        if not self._rows or self._rows[0].dtype != y.dtype:
            self._rows = self._built(y)
        return self._rows

    def refresh(self) -> None:
        """Forget the factors of the rows if they have changed since the last pass; checked once per pass."""
        if self._checked != self.plan.passes:
            self._checked, state = self.plan.passes, self._state()
            if state != self._seen:
                self._seen, self._rows = state, ()

    def _built(self, y: Tensor) -> tuple[Tensor, ...]:
        with functional.without_autocast(y.device):
            factors = [factor.to(y.dtype) for factor in self.build(self.plan.used)]
        if self.plan.in_blocks:
            return tuple(factors)
        index = self.plan.index(y.device)  # copies the factors for each row, whose gradients are added up
        return tuple(factor[index] for factor in factors)

    def _state(self) -> tuple[object, ...]:
        """Changes with the batch, and with the scales, ranks and factors of the chains that it uses."""
        deltas = cast("dict[str, ChainDelta]", self.layer.nora_delta._modules)
        self._states = {name: (self.scaling(name), self._factors[name].of([deltas[name]])) for name in self.live()}
        return self.plan.changes, self._states

    def live(self) -> list[str]:
        """The chains of this bank that the batch uses."""
        return [name for name in self.names if name in self.plan.live]

    def delta(self, name: str) -> ChainDelta:
        return chain(self.layer, name)

    def scaling(self, name: str) -> float:
        return self.layer.states[name].scaling


class CoreBank(Bank):
    """For chains that share a frozen outer pair: ``y += B C[row] A x``, ``C[row] = sum_k w_k s_k C_k [r, r]``."""

    def add(self, x: Tensor, y: Tensor, *, in_place: bool) -> Tensor:
        down, up = self.delta(self.names[0]).outer
        p = self.layer.contract(x, down)
        (cores,) = self.rows(p)
        dy = F.linear(functional.rowwise(p, cores), up.to(p.dtype))
        return y + self.layer.channels_first(dy).to(y.dtype)

    def build(self, specs: Sequence[RowSpec]) -> tuple[Tensor, ...]:
        cores = {name: self.scaling(name) * core_matrix(self.delta(name)) for name in self.live()}
        zero = torch.zeros_like(next(iter(cores.values())))
        sums = [sum((w * cores[n] for n, w in spec.items() if n in cores), start=zero) for spec in specs]
        return (torch.stack(sums).transpose(1, 2),)


class PairBank(Bank):
    """For chains of any basis in a linear layer: ``y += B[row] A[row] x``, one collapsed pair for each row.

    The pairs ``[n, d_in, K]`` and ``[n, K, d_out]`` of a batch of ``n`` rows are padded with zeros to the largest rank
    ``K`` that the chains of one row add up to.
    """

    join: Callable[[Sequence[ScaledChain]], Pair] = staticmethod(joined_pair)

    def add(self, x: Tensor, y: Tensor, *, in_place: bool) -> Tensor:
        downs, ups = self.rows(y)
        return functional.add_rowwise(y, functional.rowwise(x.to(y.dtype), downs), ups, in_place=in_place)

    def __init__(self, layer: NoraLayer, names: list[str], plan: RowPlan) -> None:
        super().__init__(layer, names, plan)
        self._kept: dict[Weights, _KeptPair] = {}

    def build(self, specs: Sequence[RowSpec]) -> tuple[Tensor, ...]:
        chains = {name: (self.scaling(name), self.delta(name)) for name in self.live()}
        used = [tuple((name, weight) for name, weight in spec.items() if name in chains) for spec in specs]
        pairs = [self._pair(spec, chains) if spec else None for spec in used]
        if len(self._kept) > 2 * len(self.plan.specs):
            self._kept = {spec: pair for spec, pair in self._kept.items() if spec in used}
        rank = max(len(pair[0]) for pair in pairs if pair is not None)
        down, up = next(pair for pair in pairs if pair is not None)
        none = down.new_zeros(0, down.shape[1]), up.new_zeros(up.shape[0], 0)
        padded = [_padded(*(pair or none), rank) for pair in pairs]
        downs, ups = (torch.stack(factors) for factors in zip(*padded, strict=True))
        return downs.mT, ups.mT

    def _pair(self, spec: Weights, chains: Mapping[str, ScaledChain]) -> Pair:
        """The pair of a spec, which is kept if the spec comes again, until a weight or a factor changes."""
        if not self.plan.keeps_pairs or torch.is_grad_enabled():
            return self._joined(spec, chains)
        kept, state = self._kept.get(spec), [self._states[name] for name, _ in spec]
        if kept is None or kept.state != state:
            kept = self._kept[spec] = _KeptPair(state, self._joined(spec, chains))
        return kept.pair

    def _joined(self, spec: Weights, chains: Mapping[str, ScaledChain]) -> Pair:
        return self.join([(weight * chains[name][0], chains[name][1]) for name, weight in spec])


@dataclass(frozen=True, eq=False)
class _KeptPair:
    """The pair of some chains, and their states when it was computed."""

    state: list[object]
    pair: Pair


class InputBank(PairBank):
    """For chains that share a frozen ``A_out``: ``y += U[row] L[row] A_out x``, one down product for all rows.

    The pairs ``[n, r, K]`` and ``[n, K, d_out]`` are those behind ``A_out``, padded like those of :class:`PairBank`.
    """

    join = staticmethod(joined_behind_input)

    def add(self, x: Tensor, y: Tensor, *, in_place: bool) -> Tensor:
        p = self.layer.contract(x, self.delta(self.names[0]).outer[0])
        lowers, uppers = self.rows(p)
        dy = functional.rowwise(functional.rowwise(p, lowers), uppers)
        return y + self.layer.channels_first(dy).to(y.dtype)


def _padded(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - len(down)
    return (F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, missing))) if missing else (down, up)


def banks(layer: NoraLayer, names: Sequence[str], plan: RowPlan) -> list[Bank]:
    """The banks of those adapters of a layer that a bank can hold together with others.

    A convolution has a bank for each basis or ``A_out`` that adapters share, and so has a linear layer under autograd,
    which then keeps ``p = A x`` and not ``x``. The pairs of :class:`PairBank` are cheaper in a pass without gradients,
    and nothing has to be compared for them.
    """
    is_linear = isinstance(layer.base_layer, nn.Linear)
    kinds: list[tuple[type[Bank], Callable[[str, str], bool]]] = []
    if torch.is_grad_enabled() or not is_linear:
        kinds += [(CoreBank, partial(_share, layer, 2)), (InputBank, partial(_share, layer, 1))]
    if is_linear:
        kinds += [(PairBank, partial(_have_similar_rank, layer))]
    left, found = [name for name in names if is_plain(layer, name)], list[Bank]()
    for kind, alike in kinds:
        groups = _groups(left, alike)
        found += [kind(layer, group, plan) for group in groups]
        banked = {name for group in groups for name in group}
        left = [name for name in left if name not in banked]
    return found


def chain(layer: NoraLayer, name: str) -> ChainDelta:
    """The delta of an adapter that is known to be a chain."""
    return cast(ChainDelta, layer.delta(name))


def is_plain(layer: NoraLayer, name: str) -> bool:
    """Whether an adapter is a plain product of matrices: no gate, magnitude, sampled rank or active dropout."""
    delta = layer.delta(name)
    return isinstance(delta, ChainDelta) and delta.is_plain


def similar_chains(layer: NoraLayer, names: Sequence[str]) -> list[list[str]]:
    """Groups of two or more chains of similar rank."""
    return _groups([name for name in names if is_plain(layer, name)], partial(_have_similar_rank, layer))


def _groups(names: Sequence[str], alike: Callable[[str, str], bool]) -> list[list[str]]:
    """Groups of two or more adapters that are alike."""
    return [group for group in functional.groups(names, alike) if len(group) > 1]


def _have_similar_rank(layer: NoraLayer, one: str, two: str) -> bool:
    """Whether padding one chain to the rank of the other costs little: the next power of two is the same, from 8."""
    ranks = [delta.rank or delta.full_rank for delta in (chain(layer, one), chain(layer, two))]
    return len({max(rank - 1, 7).bit_length() for rank in ranks}) == 1


def _share(layer: NoraLayer, sides: int, one: str, two: str) -> bool:
    return equal_sides(chain(layer, one), chain(layer, two)) >= sides


def equal_sides(one: ChainDelta, two: ChainDelta) -> int:
    """How many equal frozen outer factors two chains have, from the input on.

    Values are compared once, and again after one of the tensors has changed: it reads all of them, and waits for a GPU.
    """
    same = shared_sides(one, two)
    if same == min(one.frozen_sides, two.frozen_sides):
        return same
    known = _COMPARED.setdefault(one, WeakKeyDictionary())
    state = _basis_state(one), _basis_state(two)
    if two not in known or known[two][0] != state:
        known[two] = state, shared_sides(one, two, by_value=True)
    return known[two][1]


def _basis_state(one: ChainDelta) -> Any:
    """Changes with the frozen tensors of a chain, and with its rank."""
    return one.rank, versions(b for b in one._buffers.values() if b is not None)
