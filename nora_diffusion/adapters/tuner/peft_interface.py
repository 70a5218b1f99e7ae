"""What PEFT and diffusers read and set on a tuner layer, and the state of its adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from numbers import Real
from typing import Any, Protocol, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...errors import UserError, quoted
from ..axes import MAX_WEIGHT
from ..deltas.chain import Delta
from .merging import WeightMerge


class RowServer(Protocol):
    """Replaces the active set while each row of a batch has its own adapters (:mod:`.mixed_rows`)."""

    names: list[str]

    def fused(self, x: Tensor, /) -> Tensor | None:
        """The output for the input ``x``, if every adapter of the batch trains in one function with the layer."""
        ...

    def add(self, x: Tensor, base: Tensor, /) -> Tensor:
        """``y`` for the input ``x`` whose frozen output is ``base``."""
        ...


@dataclass
class AdapterState:
    """One adapter in one layer, beside its delta.

    ``r``: outer rank. ``native_scale``: ``alpha / r``. ``scaling``: ``native_scale`` times the user's weight, the
    factor that ``forward`` applies. ``scaling_tensor``: the same number on the device, for compiled graphs.
    """

    r: int
    native_scale: float
    scaling: float
    device: InitVar[torch.device]
    scaling_tensor: Tensor = field(init=False)

    def __post_init__(self, device: torch.device) -> None:
        self.move(device)

    def move(self, device: torch.device) -> None:
        """Put the tensor on another device."""
        with torch.inference_mode(False):  # else it could not be changed outside of a caller's inference mode
            self.scaling_tensor = torch.tensor(self.scaling, dtype=torch.float32, device=device)

    def rescale(self, scaling: float) -> None:
        """Set the factor that ``forward`` applies; in place, so that compiled graphs use it too."""
        if scaling != self.scaling:
            self.scaling = scaling
            self.scaling_tensor.fill_(scaling)


@dataclass(frozen=True)
class StateView(Mapping[str, Any]):
    """One field of the states, by adapter name: read-only, and always current."""

    states: Mapping[str, AdapterState]
    name: str

    def __getitem__(self, adapter: str) -> Any:
        return getattr(self.states[adapter], self.name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.states)

    def __len__(self) -> int:
        return len(self.states)


class PeftInterface(BaseTunerLayer):
    """The names and verbs by which PEFT and diffusers handle a layer."""

    adapter_layer_names = ("nora_delta",)
    other_param_names = ("r", "scaling")
    cast_input_dtype_enabled = False  # diffusers' layerwise casting switches it off in every tuner layer

    nora_delta: nn.ModuleDict
    states: dict[str, AdapterState]
    merging: WeightMerge
    rows: RowServer | None

    @property
    def r(self) -> Mapping[str, int]:
        """Outer rank of each adapter; read-only."""
        return StateView(self.states, "r")

    @property
    def scaling(self) -> Mapping[str, float]:
        """``alpha / r`` times the weight of each adapter; read-only, :meth:`set_scale` changes it."""
        return StateView(self.states, "scaling")

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the merged adapters."""
        return list(self.merging.scalings)

    @property
    def in_features(self) -> int:
        """Width of the input; the input channels of a convolution."""
        base: Any = self.get_base_layer()
        return int(base.in_channels if isinstance(base, nn.Conv2d) else base.in_features)

    @property
    def out_features(self) -> int:
        """Width of the output; the output channels of a convolution."""
        base: Any = self.get_base_layer()
        return int(base.out_channels if isinstance(base, nn.Conv2d) else base.out_features)

    @property
    def groups(self) -> int:
        """``groups`` of the convolution, always 1; an ordinary LoRA that wraps this layer reads it."""
        return 1

    @property
    def lora_A(self) -> nn.ModuleDict:
        """The deltas, under the name (and ``lora_B``) by which diffusers' ``set_lora_device`` finds them."""
        return self.nora_delta

    lora_B = lora_A

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may convert the adapter to a LoRA, by an SVD of its ``dW``."""
        return adapter_name in self.nora_delta and self.delta(adapter_name).mergeable

    def delta(self, adapter_name: str) -> Delta:
        """The delta module of one adapter."""
        return cast(Delta, self.nora_delta[adapter_name])

    @property
    def active(self) -> list[str]:
        """Names of the active adapters of the whole model, whether or not this layer has them."""
        return list(cast("list[str]", self.active_adapters))

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make exactly these adapters active; they alone require gradients, and none does in ``inference_mode``."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name, delta in self.nora_delta.items():
            trained = name in names and not inference_mode
            for parameter in _parameters(delta):
                if parameter.requires_grad != trained and parameter.is_leaf:
                    parameter.requires_grad_(trained)
        self._active_adapter = names
        self.refresh()

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Make exactly these adapters active, at these weights; ``requires_grad`` stays as it is."""
        self._active_adapter = list(weights)
        for name, weight in weights.items():
            self._set_weight(name, weight)
        self.refresh()

    def enable_adapters(self, enabled: bool) -> None:
        """Add the active adapters, or none."""
        super().enable_adapters(enabled)
        self.refresh()

    def refresh(self) -> None:
        """Called after each change of what the layer adds."""
        raise NotImplementedError

    def activate(self, names: list[str], inference: bool = False) -> None:
        """:meth:`set_adapter` with types."""
        self.set_adapter(names, inference_mode=inference)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move one adapter. PEFT would also cast it to the base's dtype, which rounds its frozen factors."""
        if adapter_name in self.nora_delta:
            move_filled(self.delta(adapter_name), device or self.weight.device)

    # The weight that diffusers sets is the user's factor on top of alpha / r.

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the weight of one adapter, if this layer has it."""
        self._set_weight(adapter, scale)
        self.refresh()

    def _set_weight(self, adapter: str, weight: float) -> None:
        if adapter in self.states:
            self.states[adapter].rescale(check_weight(adapter, weight) * self.states[adapter].native_scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for state in self._active_states():
            state.rescale(state.scaling * scale)
        self.refresh()

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters, or (``None``) set their weights to 1."""
        for state in self._active_states():
            if scale is None:
                state.rescale(state.native_scale)
            elif scale != 0:
                state.rescale(state.scaling / scale)
        self.refresh()

    def _active_states(self) -> list[AdapterState]:
        names = self.active if self.rows is None else self.rows.names
        return [self.states[name] for name in names if name in self.states]


def check_weight(name: str, weight: Any) -> float:
    """The weight of an adapter as Python's own number.

    Raises :class:`UserError` if it is not a finite number or its size exceeds :data:`MAX_WEIGHT`.
    """
    if type(weight) is float and abs(weight) <= MAX_WEIGHT:
        return weight
    is_number = isinstance(weight, Real) and not isinstance(weight, bool)
    if not is_number or not abs(weight) <= MAX_WEIGHT:
        raise UserError(
            f"the weight {quoted(weight)} of {name!r} is not a finite number from -{MAX_WEIGHT:g} to "
            f"{MAX_WEIGHT:g}: give a number such as 0.8"
        )
    return float(weight)


def _parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """``module.parameters()`` without the names that it builds first, which take most of a switch between adapters."""
    yield from (parameter for parameter in module._parameters.values() if parameter is not None)
    for child in module._modules.values():
        if child is not None:
            yield from _parameters(child)


def set_active_names(layer: BaseTunerLayer, names: Sequence[str]) -> None:
    """Make exactly these adapters of a tuner layer of any method active.

    ``requires_grad`` of their parameters stays as it is, which PEFT's ``set_adapter`` would set too.
    """
    layer._active_adapter = list(names)
    if isinstance(layer, PeftInterface):
        layer.refresh()


def move_filled(delta: nn.Module, device: torch.device) -> None:
    """Move a delta, if it :func:`is_filled`."""
    if is_filled(delta):
        delta.to(device)


def is_filled(delta: nn.Module) -> bool:
    """Whether a delta has factors; on the meta device it awaits its file (PEFT's ``low_cpu_mem_usage``)."""
    return not any(parameter.is_meta for parameter in delta.parameters())
