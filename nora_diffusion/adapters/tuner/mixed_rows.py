"""Mixed batches inside one model: each row of a batch has its own adapters and weights.

``dy_row = sum_k w_row,k s_k delta_k(x_row)``. Adapters that share a frozen outer pair ``A``, ``B`` are computed from a
bank with one core per row: ``y += B bank[row] A x`` with ``bank[row] = sum_k w_row,k s_k core_k [r, r]``, which takes
one down and one up product for any number of subjects. Chains of equal rank in different bases are computed from a bank
of their collapsed pairs, with two batched products. Every other adapter is applied to the rows that use it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from ..deltas import functional
from ..deltas.chain import ChainDelta
from ..deltas.joining import core_matrix, shares_basis
from .layer import NoraLayer

_SERVING: WeakSet[nn.Module] = WeakSet()
"""Models inside :func:`serve_rows`."""

RowSpec = Mapping[str, float]
"""The adapters of one row with their weights; empty for the base alone."""


class RowPlan:
    """Which adapters each row of a model's batch uses.

    A batch of ``n = g len(specs) repeats`` rows is ``g`` copies (guidance: negative, positive) of the specs in order,
    each repeated ``repeats`` times in succession (``num_images_per_prompt``). ``batch`` has the spec index of each row.
    ``exact``: refuse copies.
    """

    def __init__(self, specs: Sequence[RowSpec], *, exact: bool = False) -> None:
        self.exact = exact
        self.specs = [{name: weight for name, weight in spec.items() if weight} for spec in specs]
        self.names = list(dict.fromkeys(name for spec in self.specs for name in spec))
        self.repeats = 1
        self.batch: list[int] = []
        self._tensors: dict[Any, Tensor] = {}

    def start(self, rows: int) -> None:
        """Assign specs for a call with this many rows. Raises :class:`UserError` for a number that does not fit."""
        block = len(self.specs) * self.repeats
        if self.exact and rows != block:
            raise UserError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {block} and {rows} "
                "respectively."
            )
        if rows % block:
            times = f" (times {self.repeats} images per prompt)" if self.repeats > 1 else ""
            raise UserError(
                f"a batch of {rows} rows is not a multiple of the {len(self.specs)} rows of mixed_batch{times}: give "
                "one prompt for each row"
            )
        self.assign([(row % block) // self.repeats for row in range(rows)])

    def assign(self, batch: list[int]) -> None:
        """Set the spec index of each row of the batch."""
        if batch != self.batch:
            self.batch, self._tensors = batch, {}

    def check_prompts(self, prompts: int) -> None:
        """Raise :class:`UserError` unless there is one prompt for each row; a single row fits any number.

        :meth:`start` cannot tell: twice as many prompts look like guidance.
        """
        if len(self.specs) not in (1, prompts):
            raise UserError(
                f"{prompts} prompts but {len(self.specs)} rows of mixed_batch: give one prompt for each row"
            )

    def used(self) -> list[RowSpec]:
        """The specs of the batch, each once, in order."""
        return [self.specs[index] for index in sorted(set(self.batch))]

    def index(self, device: torch.device) -> Tensor:
        """The position in :meth:`used` of each row's spec, ``[n]``."""
        position = {index: i for i, index in enumerate(sorted(set(self.batch)))}
        return self._tensor(("index",), [position[index] for index in self.batch], device)

    def share(self, name: str, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """``(rows [m], weights [m])``: indices and weights of the rows that use an adapter; ``None`` if none does."""
        rows = [row for row, spec in enumerate(self.batch) if name in self.specs[spec]]
        if not rows:
            return None
        weights = [self.specs[self.batch[row]][name] for row in rows]
        return self._tensor(("rows", name), rows, device), self._tensor(("weights", name), weights, device)

    def _tensor(self, key: tuple[str, ...], values: Sequence[float], device: torch.device) -> Tensor:
        if (key, device) not in self._tensors:
            self._tensors[key, device] = torch.tensor(values, device=device)
        return self._tensors[key, device]


class LayerRows:
    """Adds the adapters of each row to the output of one layer."""

    def __init__(self, layer: NoraLayer, plan: RowPlan) -> None:
        self.layer, self.plan = layer, plan
        self.names = [name for name in plan.names if name in layer.nora_delta]
        chains = [name for name in self.names if _is_plain(layer, name)]
        self.banks: list[Bank] = [
            CoreBank(layer, group, plan) for group in _groups(chains, partial(_same_basis, layer))
        ]
        chains = [name for name in chains if not self._banked(name)]
        if isinstance(layer.base_layer, nn.Linear):
            self.banks += [PairBank(layer, group, plan) for group in _groups(chains, partial(_same_rank, layer))]
        self.single = [name for name in self.names if not self._banked(name)]

    def _banked(self, name: str) -> bool:
        return any(name in bank.names for bank in self.banks)

    def add(self, x: Tensor, base: Tensor) -> Tensor:
        """``y`` for the input ``x`` whose frozen output is ``base``."""
        if len(x) != len(self.plan.batch):
            raise UserError(
                f"a layer got {len(x)} rows in a mixed batch of {len(self.plan.batch)}: call the whole model, and do "
                "not adapt layers that rearrange the batch"
            )
        y = base
        for bank in self.banks:
            if bank.is_used():
                y = y + self.layer.channels_first(bank(x)).to(y.dtype)
        for name in self.single:
            share = self.plan.share(name, x.device)
            if share is not None:
                y = self._add_single(name, x, base, y, *share)
        return y

    def _add_single(self, name: str, x: Tensor, base: Tensor, y: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        all_rows = len(rows) == len(x)
        inputs = (x, base) if all_rows else (x[rows], base[rows])
        scaling, dy = self.layer.contribution(name, *inputs, rows=rows)
        dy = (weights * scaling).to(y.dtype).view(-1, *[1] * (dy.ndim - 1)) * dy.to(y.dtype)
        return y + dy if all_rows else y.index_add(0, rows, dy)


class Bank(ABC):
    """Factors of several chains, stacked by row spec; a batch selects those of its rows by index.

    Only the specs of the batch are stacked: of many subjects that train together, a pass may have two.
    """

    def __init__(self, layer: NoraLayer, names: list[str], plan: RowPlan) -> None:
        self.layer, self.names, self.plan = layer, names, plan
        self._cache: tuple[Any, tuple[Tensor, ...]] | None = None

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """``dy [n, ..., d_out]``, channels last."""

    @abstractmethod
    def build(self, specs: Sequence[RowSpec]) -> tuple[Tensor, ...]:
        """The factors of these specs, stacked; at least one spec uses a chain of this bank."""

    def is_used(self) -> bool:
        """Whether any row of the batch uses a chain of this bank."""
        return any(name in spec for spec in self.plan.used() for name in self.names)

    def rows(self, like: Tensor) -> tuple[Tensor, ...]:
        """The factors of each row; cached until a factor changes, and rebuilt in every pass under autograd."""
        specs, index = self.plan.used(), self.plan.index(like.device)
        if torch.is_grad_enabled():
            return tuple(factor.to(like.dtype)[index] for factor in self.build(specs))
        state = (like.dtype, specs, [self._state(name) for name in self._members(specs)])
        if self._cache is None or self._cache[0] != state:
            self._cache = state, tuple(factor.to(like.dtype) for factor in self.build(specs))
        return tuple(factor[index] for factor in self._cache[1])

    def _members(self, specs: Sequence[RowSpec]) -> list[str]:
        """The chains of this bank that any of these specs uses."""
        return [name for name in self.names if any(name in spec for spec in specs)]

    def _state(self, name: str) -> Any:
        """Cache key: changes when this chain's factors, rank or scale change."""
        return self.delta(name).state_key(), self._scaling(name)

    def delta(self, name: str) -> ChainDelta:
        return cast(ChainDelta, self.layer.delta(name))

    def _scaling(self, name: str) -> float:
        return self.layer.states[name].scaling


class CoreBank(Bank):
    """For chains that share a frozen outer pair: ``bank[spec] = sum_k w_k s_k core_k``, ``[specs, r, r]``."""

    def __call__(self, x: Tensor) -> Tensor:
        down, up = self.delta(self.names[0]).outer
        p = self.layer.contract(x, down)
        (cores,) = self.rows(p)
        return F.linear(functional.rowwise(p, cores.transpose(1, 2)), up.to(p.dtype))

    def build(self, specs: Sequence[RowSpec]) -> tuple[Tensor, ...]:
        cores = {name: self._scaling(name) * core_matrix(self.delta(name)) for name in self._members(specs)}
        zero = torch.zeros_like(next(iter(cores.values())))
        sums = [sum((w * cores[n] for n, w in spec.items() if n in cores), start=zero) for spec in specs]
        return (torch.stack(sums),)


class PairBank(Bank):
    """For chains of equal rank ``k`` in different bases: pairs ``[specs, K, d_in]``, ``[specs, d_out, K]``.

    ``K`` is ``k`` times the largest number of them in one spec; the pairs of the other specs are padded with zeros.
    """

    def __call__(self, x: Tensor) -> Tensor:
        downs, ups = self.rows(x)
        return functional.rowwise(functional.rowwise(x, downs.transpose(1, 2)), ups.transpose(1, 2))

    def build(self, specs: Sequence[RowSpec]) -> tuple[Tensor, ...]:
        pairs = {name: self.delta(name).pair() for name in self._members(specs)}
        down, up = next(iter(pairs.values()))
        chosen = [[(name, weight) for name, weight in spec.items() if name in pairs] for spec in specs]
        longest = max(map(len, chosen))
        downs, ups = [], []
        for members in chosen:
            padding = longest - len(members)
            downs.append(torch.cat([*(pairs[n][0] for n, _ in members), *[torch.zeros_like(down)] * padding]))
            scaled = (w * self._scaling(n) * pairs[n][1] for n, w in members)
            ups.append(torch.cat([*scaled, *[torch.zeros_like(up)] * padding], dim=1))
        return torch.stack(downs), torch.stack(ups)


def _groups(names: Sequence[str], alike: Callable[[str, str], bool]) -> list[list[str]]:
    """Groups of two or more adapters that are alike."""
    groups: list[list[str]] = []
    for name in names:
        group = next((group for group in groups if alike(group[0], name)), None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    return [group for group in groups if len(group) > 1]


def _is_plain(layer: NoraLayer, name: str) -> bool:
    """Whether an adapter is a plain product of matrices: no gate, magnitude, sampled rank or active dropout."""
    delta = layer.delta(name)
    return isinstance(delta, ChainDelta) and delta.is_plain


def _same_basis(layer: NoraLayer, one: str, two: str) -> bool:
    one_chain, other = (cast(ChainDelta, layer.delta(name)) for name in (one, two))
    return shares_basis(one_chain, other, by_value=True)


def _same_rank(layer: NoraLayer, one: str, two: str) -> bool:
    deltas = [cast(ChainDelta, layer.delta(name)) for name in (one, two)]
    return len({delta.rank or delta.full_rank for delta in deltas}) == 1


def serves_rows(model: nn.Module) -> bool:
    """Whether the model is inside :func:`serve_rows`."""
    return model in _SERVING


@contextmanager
def serve_rows(model: nn.Module, plan: RowPlan) -> Iterator[None]:
    """Apply a plan in a model's layers, in place of their active adapters and weights, until the context ends.

    Raises :class:`UserError` if the model already follows a plan.
    """
    if serves_rows(model):
        raise UserError("this model already serves a mixed batch: leave that context first")
    layers = [module for module in model.modules() if isinstance(module, NoraLayer)]
    with ExitStack() as stack:
        _SERVING.add(model)
        stack.callback(_SERVING.discard, model)
        stack.callback(model.register_forward_pre_hook(_counting(plan), with_kwargs=True).remove)
        for layer in layers:
            stack.callback(_restore, layer, dict(layer.scaling))
            for name in plan.names:
                layer.set_scale(name, 1.0)
            layer.rows = LayerRows(layer, plan)
        yield


def _restore(layer: NoraLayer, scaling: Mapping[str, float]) -> None:
    layer.rows = None
    for name, value in scaling.items():
        if name in layer.states:
            layer.states[name].rescale(value)


def _counting(plan: RowPlan) -> Any:
    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start the plan with the batch size: the length of the model's first tensor."""
        named = [kwargs[key] for key in ("sample", "hidden_states", "input_ids") if key in kwargs]
        first = next(t for t in (*named, *args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim)
        plan.start(len(first))

    return count
