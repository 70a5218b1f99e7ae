"""Gates of routed adapters: statistics for plots, and the fixed mean gate that turns a mixture into a plain LoRA."""

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
from ..adapters.presets import PRESETS, is_routed
from ..adapters.tuner.build import contraction
from ..errors import UserError
from ..pipelines.calibration import Calibration, short_run
from ..pipelines.components import Modules, components, nora_layers
from . import delete_adapter, list_adapters, load_adapter
from .mixed_batch import mixed_batch

Meter = Callable[[Tensor, Tensor], None]
"""Called with a projection's input and the output of its base layer."""


@dataclass(frozen=True)
class GateSummary:
    """Gate statistics of one layer over a run.

    ``gate [N]``: mean gate; sums to 1. ``entropy``: mean ``-sum_i g_i ln g_i`` over the single gates, in nats, from 0
    (always one expert) to ``ln N`` (all experts equally). ``decisions``: number of gates (tokens or batch rows).
    """

    gate: Tensor
    entropy: float
    decisions: int

    @property
    def sharpness(self) -> float:
        """``1 - entropy / ln N``: 0 for uniform gates, 1 if the router always picks one expert."""
        return 1.0 - self.entropy / math.log(len(self.gate)) if len(self.gate) > 1 else 0.0


@dataclass(frozen=True)
class MeanGates:
    """One fixed gate per layer, by ``component.path``, and the error of using it instead of the router.

    ``output_error`` by layer: ``||y_fixed - y||_F / ||y||_F`` for the outputs ``y = W x + s dy`` on the same inputs;
    ``change_error``: the same for the adapter's contribution ``s dy`` alone.
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
            f"{_mean(outputs):.1e} on average, at most {max(outputs):.1e} ({worst}); of the adapter's contribution "
            f"{_mean(changes):.1e} on average, at most {max(changes):.1e}"
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def router_summary(pipe: Any, adapter_name: str, prompts: Sequence[str] | None = None) -> dict[str, GateSummary]:
    """Mean gate and entropy of every routed layer, by ``component.path``, over a short seeded sampling run.

    The adapter runs alone and at weight 1; the active adapters and weights of the pipeline do not change. ``prompts``:
    generic ones by default. Raises :class:`UserError` for an adapter without a router.
    """
    meters = {key: _GateMeter(layer, delta) for key, (layer, delta) in _routed(components(pipe), adapter_name).items()}
    _run(pipe, adapter_name, prompts, meters)
    return {key: meter.summary() for key, meter in meters.items() if meter.count}


def mean_gates(pipe: Any, adapter_name: str, prompts: Sequence[str] | None = None) -> MeanGates:
    """The mean gate of each layer over the prompts, and the error of fixing it, measured in a second run.

    Raises :class:`UserError` for an adapter without a router, and for a layer that the run never calls.
    """
    calibration = _calibration(prompts)
    gates = {key: summary.gate for key, summary in router_summary(pipe, adapter_name, prompts).items()}
    routed = _routed(components(pipe), adapter_name)
    unused = sorted(set(routed) - set(gates))
    if unused:
        raise UserError(f"{unused[0]!r} was never called for these prompts, so it has no mean gate: use other prompts")
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
    """:func:`mean_gates` of an adapter file, which is loaded and deleted again."""
    used = {name for names in list_adapters(pipe).values() for name in names}
    name = next(f"gates-{i}" for i in range(len(used) + 1) if f"gates-{i}" not in used)
    load_adapter(pipe, path, name, activate=False, basis_dir=basis_dir)
    try:
        return mean_gates(pipe, name, prompts)
    finally:
        delete_adapter(pipe, name)


def _calibration(prompts: Sequence[str] | None) -> Calibration:
    return Calibration() if prompts is None else Calibration(prompts=prompts)


def _routed(modules: Modules, name: str) -> dict[str, tuple[NoraLayer, RoutedDelta]]:
    layers = {
        f"{component}.{path}": layer
        for component, module in modules.items()
        for path, layer in nora_layers(module, name).items()
    }
    found = {key: (layer, d) for key, layer in layers.items() if isinstance(d := layer.delta(name), RoutedDelta)}
    if not found:
        routed = ", ".join(filter(is_routed, PRESETS))
        problem = "has no router" if layers else "is not in the pipeline"
        raise UserError(f"the adapter {name!r} {problem}: only routed adapters ({routed}) have gates")
    return found


def _run(pipe: Any, name: str, prompts: Sequence[str] | None, meters: dict[str, Any]) -> None:
    with mixed_batch(pipe, [name]), ExitStack() as stack:
        for meter in meters.values():
            stack.enter_context(_measuring(meter.layer, meter))
        short_run(pipe, _calibration(prompts))


@contextmanager
def _measuring(layer: NoraLayer, meter: Meter) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        meter(args[0], output)

    handle = layer.base_layer.register_forward_hook(hook)  # attention processors call the base layer too
    try:
        yield
    finally:
        handle.remove()


class _GateMeter:
    """Sums the gates and entropies of a layer."""

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
    """Sums squared norms: of a layer's output, of the adapter's contribution, and of its change by a fixed gate."""

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
