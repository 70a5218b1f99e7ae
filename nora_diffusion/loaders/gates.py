"""What the routers of a mixture decide: gates for plots, and the plain LoRA that one fixed gate would make of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import NoraLayer
from ..adapters.deltas.routed import RoutedDelta
from ..adapters.tuner.build import contraction
from ..errors import UserError
from ..pipelines.calibration import Calibration, short_run
from ..pipelines.components import Modules, components, nora_layers
from . import delete_adapter, list_adapters, load_adapter
from .mixed_batch import mixed_batch

Seen = Callable[[Tensor, Tensor], None]
"""Called with a projection's input and its frozen output."""


@dataclass(frozen=True)
class GateSummary:
    """The decisions of one layer's router over a run.

    ``gate [N]``: mean gate, which sums to 1. ``entropy``: mean ``-sum_i g_i ln g_i`` of the single decisions, in nats,
    from 0 (one expert each time) to ``ln N`` (all alike). ``decisions``: tokens, or rows of the batch.
    """

    gate: Tensor
    entropy: float
    decisions: int

    @property
    def sharpness(self) -> float:
        """``1 - entropy / ln N``: 0 where the router decides nothing, 1 where it picks one expert."""
        return 1.0 - self.entropy / math.log(len(self.gate)) if len(self.gate) > 1 else 0.0


@dataclass(frozen=True)
class MeanGates:
    """One gate for each layer, by ``component.path``, and what fixing it costs.

    ``output_error`` by layer: ``||y_fixed - y||_F / ||y||_F`` of the layer's outputs ``y = W x + s dy`` on the same
    inputs; ``change_error``: the same of the adapter's part ``s dy`` alone.
    """

    gates: dict[str, Tensor]
    output_error: dict[str, float]
    change_error: dict[str, float]
    prompts: int

    def describe(self) -> str:
        """One sentence for reports."""
        worst = max(self.output_error, key=self.output_error.__getitem__)
        outputs, changes = list(self.output_error.values()), list(self.change_error.values())
        return (
            f"gates fixed at their mean over {self.prompts} prompts: relative error of the layer outputs "
            f"{_mean(outputs):.1e} on average, at most {max(outputs):.1e} ({worst}); of the adapter's own part "
            f"{_mean(changes):.1e} on average, at most {max(changes):.1e}"
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def router_summary(pipe: Any, adapter_name: str, prompts: Sequence[str] | None = None) -> dict[str, GateSummary]:
    """Mean gate and entropy of every routed layer, by ``component.path``, over a short seeded sampling of prompts.

    The adapter runs alone and at weight 1; the pipeline's own state is left as it is. ``prompts``: generic ones by
    default. Raises :class:`UserError` for an adapter without a router.
    """
    meters = {key: _GateMeter(layer, delta) for key, (layer, delta) in _routed(components(pipe), adapter_name).items()}
    _run(pipe, adapter_name, prompts, meters)
    return {key: meter.summary() for key, meter in meters.items() if meter.count}


def mean_gates(pipe: Any, adapter_name: str, prompts: Sequence[str] | None = None) -> MeanGates:
    """Each layer's mean gate over the prompts, and the error of fixing it, measured by a second run on the same ones.

    Raises :class:`UserError` for an adapter without a router, or a layer that the prompts never reach.
    """
    calibration = _calibration(prompts)
    gates = {key: summary.gate for key, summary in router_summary(pipe, adapter_name, prompts).items()}
    routed = _routed(components(pipe), adapter_name)
    unused = sorted(set(routed) - set(gates))
    if unused:
        raise UserError(f"{unused[0]!r} was never called on the calibration prompts: its gate has no mean")
    meters = {
        key: _ErrorMeter(layer, delta, layer.states[adapter_name].native_scale, gates[key])
        for key, (layer, delta) in routed.items()
    }
    _run(pipe, adapter_name, prompts, meters)
    return MeanGates(
        gates,
        {key: meter.relative(meter.output) for key, meter in meters.items()},
        {key: meter.relative(meter.change) for key, meter in meters.items()},
        len(calibration.prompts),
    )


def mean_gates_of_file(
    pipe: Any, path: str | Path, prompts: Sequence[str] | None = None, basis_dir: str | Path | None = None
) -> MeanGates:
    """:func:`mean_gates` of an adapter file, which is in the pipeline only for that time."""
    taken = {name for names in list_adapters(pipe).values() for name in names}
    name = next(f"gates-{i}" for i in range(len(taken) + 1) if f"gates-{i}" not in taken)
    load_adapter(pipe, path, name, activate=False, basis_dir=basis_dir)
    try:
        return mean_gates(pipe, name, prompts)
    finally:
        delete_adapter(pipe, name)


def _calibration(prompts: Sequence[str] | None) -> Calibration:
    return Calibration() if prompts is None else Calibration(prompts=prompts)


def _routed(modules: Modules, name: str) -> dict[str, tuple[NoraLayer, RoutedDelta]]:
    layers = {
        f"{part}.{path}": layer for part, module in modules.items() for path, layer in nora_layers(module, name).items()
    }
    found = {key: (layer, d) for key, layer in layers.items() if isinstance(d := layer.delta(name), RoutedDelta)}
    if not found:
        kind = "has no router" if layers else "is not in the pipeline"
        raise UserError(f"the adapter {name!r} {kind}: only mixtures (mor, moe_lora) have gates")
    return found


def _run(pipe: Any, name: str, prompts: Sequence[str] | None, meters: dict[str, Any]) -> None:
    with mixed_batch(pipe, [name]), ExitStack() as stack:
        for meter in meters.values():
            stack.enter_context(_watching(meter.layer, meter))
        short_run(pipe, _calibration(prompts))


@contextmanager
def _watching(layer: NoraLayer, seen: Seen) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen(args[0], output)

    handle = layer.base_layer.register_forward_hook(hook)  # every path, fused ones too, calls the frozen layer
    try:
        yield
    finally:
        handle.remove()


class _GateMeter:
    """Sums gates and entropies of a layer."""

    def __init__(self, layer: NoraLayer, delta: RoutedDelta) -> None:
        self.layer, self.delta, self.contract = layer, delta, contraction(layer.base_layer)
        self.count, self.gate, self.entropy = 0, torch.zeros(len(delta.W_g), dtype=torch.float64), 0.0

    def __call__(self, x: Tensor, output: Tensor) -> None:
        gates = self.delta.gates(x, self.contract).reshape(-1, len(self.gate)).cpu().double()  # MPS has no fp64
        self.count += len(gates)
        self.gate += gates.sum(0)
        self.entropy += float(torch.special.entr(gates).sum())

    def summary(self) -> GateSummary:
        return GateSummary((self.gate / self.count).float(), self.entropy / self.count, self.count)


class _ErrorMeter:
    """Sums squared norms of a layer's output, of its change, and of what a fixed gate makes different."""

    def __init__(self, layer: NoraLayer, delta: RoutedDelta, scale: float, gate: Tensor) -> None:
        self.layer, self.delta, self.contract, self.scale = layer, delta, contraction(layer.base_layer), scale
        self.gate = gate
        self.output = self.change = self.error = 0.0

    def __call__(self, x: Tensor, output: Tensor) -> None:
        down, up = self.delta.pair(self.gate.to(self.delta.W_g))
        routed = self.scale * self.delta(x, self.contract)
        fixed = self.scale * F.linear(self.contract(x, down), up.to(x.dtype))
        self.output += _square(output + self.layer.channels_first(routed))
        self.change += _square(routed)
        self.error += _square(fixed - routed)

    def relative(self, total: float) -> float:
        return math.sqrt(self.error / total) if total else 0.0


def _square(x: Tensor) -> float:
    return float(x.float().square().sum(-1).cpu().double().sum())  # MPS has no fp64
