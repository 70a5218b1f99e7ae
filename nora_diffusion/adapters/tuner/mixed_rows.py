"""Mixed batches inside one model: each row of a batch has its own adapters and weights.

``dy_row = sum_k w_row,k s_k delta_k(x_row)``. The chains of a linear layer are computed from a bank of pairs, one per
row, with two batched products for any number of subjects; see :mod:`.row_banks`, also for the other banks. Every
adapter that is in no bank is applied to the rows that use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ...errors import UserError
from ..deltas.chain import Delta
from ..deltas.routed import RoutedDelta
from .layer import NoraLayer
from .live_pair import is_plain_linear
from .row_banks import Bank, banks, is_plain
from .row_plan import MaskedPlan, RowPlan
from .row_stacks import MaskedBank, conv_banks

_SERVING: WeakSet[nn.Module] = WeakSet()
"""Models inside :func:`serve_rows`."""


class LayerRows:
    """Adds the adapters of each row to the output of one layer."""

    def __init__(self, layer: NoraLayer, plan: RowPlan, path: str = "") -> None:
        self.layer, self.plan, self.path = layer, plan, path
        self.names = [name for name in plan.names if name in layer.nora_delta]
        self._grouped: dict[tuple[bool, bool], tuple[list[Bank], list[str]]] = {}

    def grouped(self) -> tuple[list[Bank], list[str]]:
        """The banks of the next pass, and the adapters that are in none."""
        mode = torch.is_grad_enabled(), self.layer.training
        if mode not in self._grouped:
            found = self._banks()
            banked = {name for bank in found for name in bank.names}
            self._grouped[mode] = found, [name for name in self.names if name not in banked]
        return self._grouped[mode]

    def _banks(self) -> list[Bank]:
        if isinstance(self.plan, MaskedPlan):
            chains = [name for name in self.names if is_plain(self.layer, name)]
            return [MaskedBank(self.layer, chains, self.plan, self.path)] if chains else []
        found = banks(self.layer, self.names, self.plan)
        banked = {name for bank in found for name in bank.names}
        return [*found, *conv_banks(self.layer, [name for name in self.names if name not in banked], self.plan)]

    def forget(self) -> None:
        """Drop all that is kept of the factors; the next pass builds it again."""
        self._grouped.clear()

    def refresh(self) -> None:
        """Check the factors of the next pass; for all layers in a row it takes half the time."""
        if not torch.is_grad_enabled():
            for bank in self.grouped()[0]:
                bank.refresh()

    def fused(self, x: Tensor) -> Tensor | None:
        """The output in training, if each block of rows has one adapter, in no bank, that is fused with the layer."""
        plan, base = self.plan, cast(nn.Linear, self.layer.base_layer)
        if not plan.in_blocks or len(x) != len(plan.batch) or isinstance(plan, MaskedPlan):
            return None
        if len(plan.used) > 1 and any(bank.is_used() for bank in self.grouped()[0]):
            return None
        parts = []
        for spec, part in zip(plan.used, x.chunk(len(plan.used)), strict=True):
            names = [name for name in spec if name in self.layer.nora_delta]
            if len(names) != 1 or not _is_fused(self.layer.delta(names[0])):
                return None
            scale = spec[names[0]] * self.layer.states[names[0]].scaling
            parts.append(self.layer.delta(names[0]).linear(part, base.weight, base.bias, scale))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def add(self, x: Tensor, base: Tensor) -> Tensor:
        """``y`` for the input ``x`` whose frozen output is ``base``; may write into ``base``."""
        if len(x) != len(self.plan.batch):
            raise UserError(
                f"a layer got {len(x)} rows in a mixed batch of {len(self.plan.batch)}: call the whole model, and do "
                "not adapt layers that rearrange the batch"
            )
        y, (banked, single) = base, self.grouped()
        for name in single:  # first, because a magnitude reads the frozen output
            share = self.plan.share(name, x.device)
            if share is not None:
                y = self._add_single(name, x, base, y, *share)
        for bank in banked:
            if bank.is_used():
                is_ours = y is not base or is_plain_linear(self.layer.base_layer)
                y = bank.add(x, y, in_place=is_ours and not torch.is_grad_enabled())
        return y

    def _add_single(self, name: str, x: Tensor, base: Tensor, y: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        all_rows = len(rows) == len(x)
        inputs = (x, base) if all_rows else (x[rows], base[rows])
        scaling, dy = self.layer.contribution(name, *inputs, rows=rows)
        dy = (weights * scaling).to(y.dtype).view(-1, *[1] * (dy.ndim - 1)) * dy.to(y.dtype)
        if isinstance(self.plan, MaskedPlan):
            is_conv = isinstance(self.layer.base_layer, nn.Conv2d)
            mask = self.plan.mask(self.path, name, y.shape[2:] if is_conv else y.shape[1:-1])
            dy = dy if mask is None else dy * self.layer.channels_first(mask).to(dy)
        return y + dy if all_rows else y.index_add(0, rows, dy)


def _is_fused(delta: Delta) -> bool:
    """Whether a delta trains in one function with its layer; the gates of other routers belong to whole batches."""
    return delta.fuses and not (isinstance(delta, RoutedDelta) and delta.conditioned)


def serves_rows(model: nn.Module) -> bool:
    """Whether the model is inside :func:`serve_rows`."""
    return model in _SERVING


@contextmanager
def serve_rows(
    model: nn.Module, plan: RowPlan, modules: Iterable[tuple[str, nn.Module]] | None = None
) -> Iterator[None]:
    """Apply a plan in a model's layers, in place of their active adapters and weights, until the context ends.

    ``modules``: those in which to look for the layers, with their paths (default: all of the model).

    Raises :class:`UserError` if the model already follows a plan.
    """
    if serves_rows(model):
        raise UserError("this model already serves a mixed batch: leave that context first")
    modules = model.named_modules() if modules is None else modules
    layers = {path: module for path, module in modules if isinstance(module, NoraLayer)}
    with ExitStack() as stack:
        _SERVING.add(model)
        stack.callback(_SERVING.discard, model)
        servers = [LayerRows(layer, plan, path) for path, layer in layers.items()]
        stack.callback(model.register_forward_pre_hook(_starting(plan, servers), with_kwargs=True).remove)
        for layer, rows in zip(layers.values(), servers, strict=True):
            stack.callback(_restore, layer, {name: layer.states[name].scaling for name in rows.names})
            layer.rows = rows
            for name in () if isinstance(plan, MaskedPlan) else rows.names:
                layer.set_scale(name, 1.0)
        yield


def _restore(layer: NoraLayer, scaling: Mapping[str, float]) -> None:
    layer.rows = None
    for name, value in scaling.items():
        if name in layer.states:
            layer.states[name].rescale(value)
    layer.refresh()


def _starting(plan: RowPlan, servers: Sequence[LayerRows]) -> Any:
    def start(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start the plan with the batch size: the length of the model's first tensor."""
        named = [kwargs[key] for key in ("sample", "hidden_states", "input_ids") if key in kwargs]
        first = next(t for t in (*named, *args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim)
        plan.begin(first)
        for rows in servers:
            rows.refresh()

    return torch.compiler.disable(start)  # it reads addresses and versions of tensors
