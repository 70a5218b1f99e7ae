"""ResLoRA: residual paths between the pairs of consecutive blocks while training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapters import NoraLayer
from ...adapters.deltas.functional import at_least_single
from ...formats.adapter_writing import Contents, Part
from ...formats.compacting import Factors, config_of_ranks, narrow_names
from ..hooks.step_hook import State, StepHook
from ..hooks.trained import Layer, Trained
from .blocks import layers_before

WINDOW = 100
"""Passes over which the mean of the norms is taken, as in the published code."""
Seen = dict[Layer, Tensor]
"""What each layer has seen in the pass so far: its input, or the image of that under ``A``."""


class Shortcut(ABC):
    """One of the paper's three paths. ``adapter``: the name of the adapter that it acts on."""

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter

    def seen(self, layer: NoraLayer, x: Tensor) -> Tensor:
        """What the next block uses of this one's input."""
        return x

    @abstractmethod
    def path(self, layer: NoraLayer, before: NoraLayer, x: Tensor, seen_before: Tensor) -> Tensor:
        """What the path adds to the output of ``layer``, ``[..., d_out]``."""

    def update(self, layer: NoraLayer, giver: NoraLayer, x: Tensor) -> Tensor:
        """``s B A x`` with the pair of ``giver``, for an input of ``layer``; channels last."""
        delta: Any = giver.delta(self.adapter)
        dy: Tensor = delta(x, layer.contract)
        return giver.states[self.adapter].native_scale * dy


class InputShortcut(Shortcut):
    """``dy_n = s B_n A_n (x_n + x_{n-1})``."""

    def path(self, layer: NoraLayer, before: NoraLayer, x: Tensor, seen_before: Tensor) -> Tensor:
        return self.update(layer, layer, seen_before)


class BlockShortcut(Shortcut):
    """``dy_n = s (B_n A_n + B_{n-1} A_{n-1}) x_n``."""

    def path(self, layer: NoraLayer, before: NoraLayer, x: Tensor, seen_before: Tensor) -> Tensor:
        return self.update(layer, before, x)


class MiddleShortcut(Shortcut):
    """``dy_n = s B_n (A_n x_n + A_{n-1} x_{n-1})``."""

    def seen(self, layer: NoraLayer, x: Tensor) -> Tensor:
        """``A_n x_n``, channels last."""
        below, _ = self._halves(layer)
        return _applied(layer.contract(x, below[0]), below[1:])

    def path(self, layer: NoraLayer, before: NoraLayer, x: Tensor, seen_before: Tensor) -> Tensor:
        return layer.states[self.adapter].native_scale * _applied(seen_before, self._halves(layer)[1])

    def _halves(self, layer: NoraLayer) -> tuple[list[Tensor], list[Tensor]]:
        delta: Any = layer.delta(self.adapter)
        halves: tuple[list[Tensor], list[Tensor]] = delta.halves(None)
        return halves


def _applied(p: Tensor, factors: list[Tensor]) -> Tensor:
    for factor in factors:
        p = F.linear(p, factor.to(p.dtype))
    return p


SHORTCUTS: dict[str, type[Shortcut]] = {"input": InputShortcut, "block": BlockShortcut, "middle": MiddleShortcut}
Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], "Tensor | None"]


class ResLoRA(StepHook):
    """ResLoRA: ``dy_n = s (B_n A_n + B_{n-1} A_{n-1}) x_n`` while training, or one of two other paths.

    The shortcut ``block``; ``input`` is ``s B_n A_n (x_n + x_{n-1})`` and ``middle`` is
    ``s B_n (A_n x_n + A_{n-1} x_{n-1})``. All are between the projections of one name and shape in consecutive blocks.
    Where ``x_n`` and ``x_{n-1}`` differ in size, as between the resolutions of a UNet, ``input`` and ``middle`` have
    no path. The saved adapter has none at all: with ``block`` it has the stacked pairs, which is exact; with ``input``
    and ``middle`` it has ``(1 + norm(v_{n-1}) / norm(v_n)) B_n``, the paper's estimate, with the mean norms of
    ``v = x`` or ``v = A x`` over the last passes. https://arxiv.org/abs/2402.18039
    """

    name = "reslora"
    needs_own_pass = True

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        self.shortcut = SHORTCUTS[trained.plan.config.shortcut or "block"](trained.adapter)
        self.layers = trained.layers
        self.before = layers_before(self.layers)
        self.norms = torch.zeros(len(self.layers), 2, device=trained.plan.device)
        """Mean norms of ``v_n`` and ``v_{n-1}`` for each layer, 0 where there is no path."""
        self.passes = 0

    @contextmanager
    def around_pass(self, step: int) -> Iterator[None]:
        """Add the paths, and measure the norms."""
        seen: Seen = {}
        with self._hooked(lambda key: self._with_path(key, seen)):
            yield
        if not self.is_exact:
            self._measure(seen)

    @contextmanager
    def as_saved(self) -> Iterator[None]:
        """Add what the merged pairs do: the path itself where it is exact, else the estimate."""
        with self._hooked(lambda key: self._with_path(key, {}) if self.is_exact else self._with_estimate(key)):
            yield

    @property
    def is_exact(self) -> bool:
        """Whether the path is a pair that can be merged."""
        return isinstance(self.shortcut, BlockShortcut)

    @contextmanager
    def _hooked(self, hook_of: Callable[[Layer], Hook]) -> Iterator[None]:
        with ExitStack() as stack:
            for key, layer in self.layers.items():
                stack.callback(layer.register_forward_hook(hook_of(key)).remove)
            yield

    def _with_path(self, key: Layer, seen: Seen) -> Hook:
        layer, earlier = self.layers[key], self.before.get(key)

        def add(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
            if layer.disable_adapters:
                return None
            x = args[0]
            if self.is_exact:
                return y if earlier is None else _plus(layer, y, self.shortcut.path(layer, self.layers[earlier], x, x))
            seen[key] = self.shortcut.seen(layer, x)
            if earlier is None or earlier not in seen or seen[earlier].shape != seen[key].shape:
                return y
            return _plus(layer, y, self.shortcut.path(layer, self.layers[earlier], x, seen[earlier]))

        return add

    def _with_estimate(self, key: Layer) -> Hook:
        layer, share = self.layers[key], self.shares()[key]

        def add(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
            return (
                None if layer.disable_adapters else _plus(layer, y, share * self.shortcut.update(layer, layer, args[0]))
            )

        return add

    @torch.no_grad()
    def _measure(self, seen: Mapping[Layer, Tensor]) -> None:
        """Update the mean norms by those of a pass."""
        norms = {key: at_least_single(value.detach()).norm().to(self.norms) for key, value in seen.items()}
        self.passes += 1
        rows = dict(zip(self.layers, self.norms, strict=True))
        for key, earlier in self.before.items():
            if earlier in seen and key in seen and seen[earlier].shape == seen[key].shape:
                rows[key].lerp_(torch.stack([norms[key], norms[earlier]]), 1 / min(self.passes, WINDOW))

    def shares(self) -> dict[Layer, float]:
        """``norm(v_{n-1}) / norm(v_n)`` of each layer, 0 where there is no path."""
        own, earlier = self.norms.unbind(1)
        return dict(zip(self.layers, torch.where(own > 0, earlier / own, 0.0).tolist(), strict=True))

    def state(self) -> State:
        """The mean norms, and over how many passes."""
        return {"norms": self.norms, "passes": torch.tensor(self.passes)}

    def load_state(self, state: State) -> None:
        """Continue from :meth:`state`."""
        self.norms.copy_(state["norms"])
        self.passes = int(state["passes"])

    def finish(self, contents: Contents) -> Contents:
        """Merge the paths into the pairs."""
        return {name: self._stacked(name, part) if self.is_exact else self._scaled(name, part)
                for name, part in contents.items()}  # fmt: skip

    def _stacked(self, component: str, part: Part) -> Part:
        """``[B_n B_{n-1}] [A_n; A_{n-1}]`` in each layer."""
        layers = {}
        for path, own in part.layers.items():
            earlier = self.before.get((component, path))
            pairs = [own] if earlier is None else [own, part.layers[earlier[1]]]
            layers[path] = own | {
                "A": torch.cat([pair["A"] for pair in pairs]),
                "B": torch.cat([pair["B"] for pair in pairs], 1),
            }
        return Part(config_of_ranks(part.config, layers), layers)

    def _scaled(self, component: str, part: Part) -> Part:
        """``(1 + norm(v_{n-1}) / norm(v_n)) B_n`` in each layer."""
        shares = self.shares()
        return replace(part, layers={p: _times(own, 1 + shares[component, p]) for p, own in part.layers.items()})


def _times(factors: Factors, factor: float) -> Factors:
    _, upper = narrow_names(factors)
    return factors | {upper: factor * factors[upper]}


def _plus(layer: NoraLayer, y: Tensor, dy: Tensor) -> Tensor:
    return y + layer.channels_first(dy).to(y.dtype)
