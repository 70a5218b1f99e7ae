"""Mixed batches inside one model: each row of a batch gets adapters and weights of its own.

``dy_row = sum_k w_row,k s_k delta_k(x_row)``. Adapters that sit in one frozen outer pair ``A``, ``B`` are served from a
bank with one core a row, ``y += B bank[row] A x`` with ``bank[row] = sum_k w_row,k s_k core_k [r, r]`` (zero: the base
alone): one down and one up product whatever the number of subjects. Any other adapter computes the rows that want it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from . import functional
from .deltas import ChainDelta
from .layer import NoraLayer

RowSpec = Mapping[str, float]
"""The adapters of one row with their weights; empty for the base alone."""


class RowPlan:
    """Which adapters the rows of a model's batch use.

    A batch of ``n = g len(specs) repeats`` rows is ``g`` copies (guidance: negative, positive) of the rows in order,
    each repeated ``repeats`` times in succession (``num_images_per_prompt``).
    """

    def __init__(self, specs: Sequence[RowSpec], repeats: int = 1) -> None:
        self.specs = [{name: weight for name, weight in spec.items() if weight} for spec in specs]
        self.names = list(dict.fromkeys(name for spec in specs for name in spec))
        self.repeats = repeats
        self.batch: list[int] = []
        self._tensors: dict[Any, Tensor] = {}

    def start(self, rows: int) -> None:
        """Note that the model is called with so many rows. Raises :class:`UserError` if they cannot be told apart."""
        block = len(self.specs) * self.repeats
        if rows % block:
            times = f" (times {self.repeats} images per prompt)" if self.repeats > 1 else ""
            raise UserError(
                f"a batch of {rows} rows is no multiple of the {len(self.specs)} rows of mixed_batch{times}: give one "
                "prompt for each row"
            )
        self.batch = [(row % block) // self.repeats for row in range(rows)]

    def index(self, device: torch.device) -> Tensor:
        """For each row of the batch the number of its spec, ``[n]``."""
        return self._tensor(("index", device), self.batch, device)

    def share(self, name: str, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """``(rows [m], weights [m])`` of the rows of the batch that use an adapter; None when none does."""
        rows = [row for row, spec in enumerate(self.batch) if name in self.specs[spec]]
        if not rows:
            return None
        weights = [self.specs[self.batch[row]][name] for row in rows]
        return self._tensor((name, device), rows, device), self._tensor((name, "weights", device), weights, device)

    def _tensor(self, key: Any, values: Sequence[float], device: torch.device) -> Tensor:
        key = (*key, len(self.batch), self.repeats)
        if key not in self._tensors:
            self._tensors[key] = torch.tensor(values, device=device)
        return self._tensors[key]


class LayerRows:
    """What one layer adds to the rows of a batch."""

    def __init__(self, layer: NoraLayer, plan: RowPlan) -> None:
        self.layer, self.plan = layer, plan
        self.names = [name for name in plan.names if name in layer.nora_delta]
        self.banks = [Bank(layer, group, plan) for group in _sharing(layer, self.names)]
        banked = {name for bank in self.banks for name in bank.names}
        self.single = [name for name in self.names if name not in banked]

    def add(self, x: Tensor, base: Tensor) -> Tensor:
        """``y`` for the input ``x`` whose frozen output is ``base``."""
        if len(x) != len(self.plan.batch):
            raise UserError(
                f"a layer got {len(x)} rows in a mixed batch of {len(self.plan.batch)}: call the whole model, and do "
                "not adapt layers that rearrange the batch"
            )
        y = base
        for bank in self.banks:
            y = y + self.layer.channels_first(bank(x)).to(y.dtype)
        for name in self.single:
            share = self.plan.share(name, x.device)
            if share is not None:
                y = self._add_single(name, x, base, y, *share)
        return y

    def _add_single(self, name: str, x: Tensor, base: Tensor, y: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        everywhere = len(rows) == len(x)
        some = (x, base) if everywhere else (x[rows], base[rows])
        scaling, dy = self.layer.contribution(name, *some, rows=rows)
        dy = (weights * scaling).to(y.dtype).view(-1, *[1] * (dy.ndim - 1)) * dy.to(y.dtype)
        return y + dy if everywhere else y.index_add(0, rows, dy)


class Bank:
    """The cores of adapters that share one outer pair, summed for each row spec: ``[specs, r, r]``."""

    def __init__(self, layer: NoraLayer, names: list[str], plan: RowPlan) -> None:
        self.layer, self.names, self.plan = layer, names, plan
        self._cache: tuple[Any, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """``dy [n, ..., d_out]``, channels last."""
        down, up = self._delta(self.names[0]).outer
        p = self.layer._contract(x, down)
        cores = self.cores().to(p.dtype)[self.plan.index(p.device)]
        return F.linear(functional.rowwise(p, cores.transpose(1, 2)), up.to(p.dtype))

    def cores(self) -> Tensor:
        """The bank; kept between calls while no number in it changes, and formed anew under autograd."""
        if torch.is_grad_enabled():
            return self._build()
        parameters = [p for name in self.names for p in self._delta(name).parameters()]
        scalings = [self.layer.scaling[name] for name in self.names]
        state = (scalings, [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters])
        if self._cache is None or self._cache[0] != state:
            self._cache = state, self._build()
        return self._cache[1]

    def _build(self) -> Tensor:
        cores = {name: self.layer.scaling[name] * core_matrix(self._delta(name)) for name in self.names}
        none = torch.zeros_like(cores[self.names[0]])
        return torch.stack(
            [sum((w * cores[n] for n, w in spec.items() if n in cores), start=none) for spec in self.plan.specs]
        )

    def _delta(self, name: str) -> ChainDelta:
        delta = self.layer.delta(name)
        assert isinstance(delta, ChainDelta)
        return delta


def core_matrix(delta: ChainDelta) -> Tensor:
    """The core of a chain as a matrix ``[r, r]`` in fp32 (or wider)."""
    assert delta.core is not None
    down, up = delta.core.pair()
    return down.float() if up is None else up.float() @ down.float()


def _sharing(layer: NoraLayer, names: Sequence[str]) -> list[list[str]]:
    """Groups of two or more adapters of a layer with equal frozen outer pairs."""
    groups: list[tuple[tuple[Tensor, Tensor], list[str]]] = []
    for name in names:
        mine = _frozen_pair(layer, name)
        if mine is None:
            continue
        for other, group in groups:
            if all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(mine, other, strict=True)):
                group.append(name)
                break
        else:
            groups.append((mine, [name]))
    return [group for _, group in groups if len(group) > 1]


def _frozen_pair(layer: NoraLayer, name: str) -> tuple[Tensor, Tensor] | None:
    """The outer pair of an adapter that is a bare core in it: no magnitude, no cut rank, no dropout at work."""
    delta = layer.delta(name)
    if not isinstance(delta, ChainDelta) or delta.core is None or delta.m is not None:
        return None
    dropping = delta.training and delta.dropout.p > 0
    frozen = not any(factor.requires_grad for factor in delta.outer)
    return delta.outer if frozen and not delta.masked and delta.rank is None and not dropping else None


@contextmanager
def serve_rows(model: nn.Module, plan: RowPlan) -> Iterator[None]:
    """Have a model's layers follow a plan instead of their active set; all is as it was when the context ends.

    The plan's weights stand in for those that were set. Raises :class:`UserError` where a plan is followed already.
    """
    layers = [module for module in model.modules() if isinstance(module, NoraLayer)]
    if any(layer.rows is not None for layer in layers):
        raise UserError("this model already serves a mixed batch: leave that context first")
    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(_counting(plan), with_kwargs=True).remove)
        for layer in layers:
            stack.callback(_restore, layer, dict(layer.scaling))
            for name in plan.names:
                layer.set_scale(name, 1.0)
            layer.rows = LayerRows(layer, plan)
        yield


def _restore(layer: NoraLayer, scaling: dict[str, float]) -> None:
    layer.rows = None
    for name, value in scaling.items():
        if name in layer.scaling:
            layer._rescale(name, value)


def _counting(plan: RowPlan) -> Any:
    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Rows of the batch: the length of the model's first tensor."""
        named = [kwargs[key] for key in ("sample", "hidden_states", "input_ids") if key in kwargs]
        given = next(t for t in (*named, *args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim)
        plan.start(len(given))

    return count
