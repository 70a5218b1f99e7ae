"""The tuner layer: a frozen projection (linear or convolution) with any number of named deltas."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ...errors import UserError
from ..config import AdapterConfig
from ..deltas.chain import ChainDelta, Delta
from ..deltas.routed import RoutedDelta
from .build import build_delta, contraction, flat_weight
from .merging import Merged, bit_sum
from .offloading import is_offloaded, onloaded

if TYPE_CHECKING:
    from typing_extensions import Self


class RowServer(Protocol):
    """What stands in for the active set while each row of a batch has adapters of its own (:mod:`.mixed_rows`)."""

    names: list[str]

    def add(self, x: Tensor, base: Tensor, /) -> Tensor:
        """``y`` for the input ``x`` whose frozen output is ``base``."""
        ...


class NoraLayer(nn.Module, BaseTunerLayer):
    """``y = base(x) + sum_k scaling_k * delta_k(x)`` over the active, unmerged adapters ``k``.

    It always sits innermost, directly around the ``nn.Linear`` or ``nn.Conv2d``; tuner layers of other methods wrap
    it. Merging keeps a copy of the weight, so that unmerging restores it bit for bit.
    """

    adapter_layer_names = ("nora_delta",)
    other_param_names = ("r", "scaling", "nora_scale")
    cast_input_dtype_enabled = False  # what diffusers' layerwise casting switches off in every tuner layer

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        if isinstance(base_layer, nn.Conv2d) and base_layer.groups != 1:
            raise UserError(f"grouped convolutions (groups={base_layer.groups}) cannot be adapted: exclude them")
        self.base_layer = base_layer
        self.nora_delta = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.nora_scale: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] = []
        self._disable_adapters = False
        self._merged: Merged | None = None
        self._mark: int | None = None
        self._scales: dict[str, Tensor] = {}
        self.contract = contraction(base_layer)
        """Applies a down-projection ``[k, d_in]`` to an input of this layer: ``p [..., k]``."""
        self.rows: RowServer | None = None

    def update_layer(self, adapter_name: str, config: AdapterConfig, key: str) -> None:
        """Add one adapter, active and at weight 1."""
        delta = build_delta(config, self.base_layer, key)
        delta.to(flat_weight(self.base_layer).device).train(self.base_layer.training)
        self.nora_delta[adapter_name] = delta
        self.r[adapter_name] = config.rank_for(key)
        self.set_nora_scale(adapter_name, config.scale_for(key))
        if config.start.empty:  # not to be seen until whoever fills it gives it a weight
            self.rescale(adapter_name, 0.0)
        if config.magnitude and self._merged is None:
            self._mark = bit_sum(cast(Tensor, self.base_layer.weight))
        self.activate([*self.active, adapter_name], inference=config.inference_mode)

    @property
    def groups(self) -> int:
        """Of a convolution, always 1: an ordinary LoRA that wraps this layer asks for it."""
        return 1

    @property
    def lora_A(self) -> nn.ModuleDict:
        """The deltas, under the name by which diffusers' ``set_lora_device`` finds what it moves; so is ``lora_B``."""
        return self.nora_delta

    lora_B = lora_A

    @property
    def active(self) -> list[str]:
        """Names of the active adapters of the whole model, held here or not."""
        return list(cast("list[str]", self.active_adapters))

    def activate(self, names: list[str], inference: bool = False) -> None:
        """Make exactly these adapters active; they want gradients unless ``inference``."""
        cast(Any, self).set_adapter(names, inference_mode=inference)

    def delta(self, adapter_name: str) -> Delta:
        """The delta module of one adapter."""
        return cast(Delta, self.nora_delta[adapter_name])

    def live_names(self) -> Iterator[str]:
        """Names of the adapters that ``forward`` adds now."""
        if self.disable_adapters:
            return
        for name in self.active:
            # A compiled graph must not look at the number: it would be compiled again for each.
            counts = torch.compiler.is_compiling() or self.scaling.get(name) != 0
            if counts and name in self.nora_delta and name not in self.merged_adapters:
                yield name

    def live_scale(self, adapter: str) -> float | Tensor:
        """The scaling as ``forward`` uses it: a tensor in a compiled graph, which then serves every weight."""
        return self._scales[adapter] if torch.compiler.is_compiling() else self.scaling[adapter]

    def row_factors(self, adapter: str, working: bool = False) -> Tensor | None:
        """DoRA's factor of each output row of the frozen weight, ``[d_out]``; ``None`` without a magnitude.

        ``working``: at the rank of a training pass.
        """
        delta = self.delta(adapter)
        if not isinstance(delta, ChainDelta):
            return None
        rank = delta.working_rank if working else delta.rank
        return delta.row_factors(self._frozen_weight().flatten(1), self.nora_scale[adapter], rank)

    def _frozen_weight(self) -> Tensor:
        """The weight without what is merged into it."""
        weight = cast(Tensor, self.base_layer.weight).detach()
        return weight if self._merged is None else self._merged.clean.to(weight)  # which lies on the CPU

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        base: Tensor = self.base_layer(x, *args, **kwargs)
        if not is_offloaded(self.base_layer):
            return self._adapted(x, base)
        with onloaded(self.nora_delta, *([self.base_layer] if self._rescales() else [])):
            return self._adapted(x, base)

    def _adapted(self, x: Tensor, base: Tensor) -> Tensor:
        """The output for an input whose frozen output is ``base``."""
        if self.rows is not None and not self.disable_adapters:
            return self.rows.add(x, base)
        y = base
        for name in self.live_names():
            scaling, dy = self.contribution(name, x, base)
            y = y + scaling * dy.to(y.dtype)
        return y

    def contribution(
        self, adapter: str, x: Tensor, base: Tensor, rows: Tensor | None = None
    ) -> tuple[float | Tensor, Tensor]:
        """``(scaling, dy)`` of one adapter for an input and its frozen output, which are these ``rows`` of a batch."""
        delta, scaling = self.delta(adapter), self.live_scale(adapter)
        if rows is not None and isinstance(delta, RoutedDelta):
            dy = delta.from_skinny(self.contract(x, delta.skinny_weight()), rows)
        elif torch.is_grad_enabled() or delta.training:
            dy = delta(x, self.contract)
        else:
            dy = delta.from_skinny(self.contract(x, delta.skinny_weight()))
        dy = self.channels_first(dy)
        factors = self.row_factors(adapter, working=True)
        if factors is not None:
            dy = self._rescaled(dy, factors, self.nora_scale[adapter], x, base)
            scaling = scaling / self.nora_scale[adapter]
        return scaling, dy

    def channels_first(self, dy: Tensor) -> Tensor:
        """``dy [..., d_out]`` in the layout of the layer's output."""
        return dy.movedim(-1, 1) if isinstance(self.base_layer, nn.Conv2d) else dy

    def _rescaled(self, dy: Tensor, factors: Tensor, scale: float, x: Tensor, base: Tensor) -> Tensor:
        """DoRA: ``(c - 1) W x + c s dy`` with the bias left out of it, so that a weight of 0 is the base."""
        is_conv = isinstance(self.base_layer, nn.Conv2d)
        bias = cast("Tensor | None", self.base_layer.bias)
        if self._merged is not None:
            plain = self.contract(x, self._frozen_weight().flatten(1))
            plain = plain.movedim(-1, 1) if is_conv else plain
        else:
            bias = None if bias is None else (bias.view(-1, 1, 1) if is_conv else bias).to(base.dtype)
            plain = base if bias is None else base - bias
        factors = factors.view(-1, 1, 1) if is_conv else factors
        return (factors - 1) * plain + factors * scale * dy

    # Scales, as diffusers sets them: `weight` is the user's factor on top of alpha / r.

    def set_scale(self, adapter: str, scale: float) -> None:
        if adapter in self.scaling:
            self.rescale(adapter, scale * self.nora_scale[adapter])

    def scale_layer(self, scale: float) -> None:
        for name in self._active_here():
            self.rescale(name, self.scaling[name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        for name in self._active_here():
            if scale is None:
                self.rescale(name, self.nora_scale[name])
            elif scale != 0:
                self.rescale(name, self.scaling[name] / scale)

    def set_nora_scale(self, adapter: str, scale: float) -> None:
        """Set ``alpha / r`` of an adapter; its weight becomes 1."""
        self.nora_scale[adapter] = scale
        self.rescale(adapter, scale)

    def rescale(self, adapter: str, scaling: float) -> None:
        """Set the whole factor of an adapter, ``alpha / r`` times its weight."""
        self.scaling[adapter] = scaling
        self._scales.setdefault(adapter, self._scale_tensor(scaling)).fill_(scaling)

    def _scale_tensor(self, scaling: float) -> Tensor:
        with torch.inference_mode(False):  # else it could not be filled again outside of a caller's inference mode
            return torch.tensor(scaling, dtype=torch.float32, device=cast(Tensor, self.base_layer.weight).device)

    def _active_here(self) -> list[str]:
        names = self.active if self.rows is None else self.rows.names
        return [name for name in names if name in self.nora_delta]

    # Merging

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``scaling * dW`` in the shape of the base weight, fp32."""
        return self._change(adapter, self.scaling[adapter])

    def _change(self, adapter: str, scaling: float) -> Tensor:
        weight, dw = self._frozen_weight(), self.delta(adapter).delta_weight()
        factors = self.row_factors(adapter)
        if factors is None:
            return (scaling * dw).view(weight.shape)
        scale, factors = self.nora_scale[adapter], factors.unsqueeze(1)
        change = (factors - 1) * weight.flatten(1) + factors * scale * dw
        return (scaling / scale * change).view(weight.shape)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active adapters' ``dW`` to the weight; one that has none (MoR) stays live, with a warning."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.nora_delta]
        routed = [n for n in names if not self.delta(n).mergeable]
        if routed:
            warnings.warn(f"{', '.join(routed)}: a routed adapter cannot be merged; it stays live", stacklevel=2)
        self._merge({n: self.scaling[n] for n in names if n not in routed}, safe_merge)

    def _merge(self, scalings: dict[str, float], safe_merge: bool = False) -> None:
        rescaling = self._rescales()
        # A magnitude rescales the frozen weight itself: it is kept even if only a LoRA on top of us is being fused.
        if not scalings and not rescaling:
            return
        weight = cast(Tensor, self.base_layer.weight)
        if weight.is_meta:
            raise UserError("the weights are offloaded layer by layer: call pipe.remove_all_hooks() before fusing")
        before = self._merged
        if before is None and rescaling and self._mark not in (None, bit_sum(weight)):
            raise UserError(
                "an adapter with a magnitude (DoRA) no longer sees its own weight: a LoRA was fused into the same "
                "projection first, or the weight was changed; unfuse_lora(), then delete one of the two"
            )
        start, added = weight.detach(), scalings
        if before is not None:
            scalings = before.scalings | scalings
            if before.intact(weight):  # all of them in one sum: rounding twice could not be undone
                start, added = before.clean.to(weight.device), scalings
        merged = self._with_deltas(start, added)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"merging {', '.join(added)} gives weights that are not finite: the adapter is broken")
        clean = weight.detach().to("cpu", copy=True) if before is None else before.clean
        weight.data.copy_(merged)
        self._merged = Merged(clean, scalings, bit_sum(weight))
        self.merged_adapters[:] = scalings

    def unmerge(self) -> None:
        """Take all merged adapters out; bit for bit unless another tool changed the merged weight meanwhile."""
        if self._merged is None:
            return
        weight = cast(Tensor, self.base_layer.weight)
        if self._merged.intact(weight):
            weight.data.copy_(self._merged.clean)
        else:
            weight.data.copy_(self._with_deltas(weight.detach(), self._merged.scalings, sign=-1.0))
            self._mark = None  # other tools leave their rounding behind
        self.merged_adapters.clear()
        self._merged = None

    def _rescales(self) -> bool:
        """Whether an adapter has a magnitude, for which the frozen weight is read."""
        return any(getattr(delta, "m", None) is not None for delta in self.nora_delta.values())

    def _with_deltas(self, weight: Tensor, scalings: dict[str, float], sign: float = 1.0) -> Tensor:
        if not scalings:
            return weight
        total = torch.stack([self._change(name, scaling) for name, scaling in scalings.items()]).sum(0)
        return (weight.float() + sign * total).to(weight.dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove one adapter; what was merged is unmerged first, so that nothing of it remains in the weight."""
        others: dict[str, float] = {}
        if self._merged is not None and adapter_name in self._merged.scalings:
            others = {n: s for n, s in self._merged.scalings.items() if n != adapter_name}
            self.unmerge()
        self._drop(adapter_name)
        if others:
            self._merge(others)

    def _drop(self, adapter_name: str) -> None:
        active = [name for name in self.active if name != adapter_name]
        for table in (self.r, self.scaling, self.nora_scale, self._scales):
            table.pop(adapter_name, None)
        if adapter_name in self.nora_delta:
            del self.nora_delta[adapter_name]
        # Not `activate`: whether the others want gradients is not this adapter's business.
        self._active_adapter = active

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """``.to()`` and its like, for each tensor once: torch would give every adapter a copy of a shared basis."""
        done: dict[int, tuple[Tensor, Tensor]] = {}

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in done:
                done[id(tensor)] = tensor, fn(tensor)
            return done[id(tensor)][1]

        super()._apply(once, recurse)  # type: ignore[no-untyped-call]
        if self._mark is not None:
            self._mark = None if self._merged is not None else bit_sum(cast(Tensor, self.base_layer.weight))
        for name, scaling in self.scaling.items():
            self._scales[name] = self._scale_tensor(scaling)
        return self

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:  # by an SVD of its dW
        return adapter_name in self.nora_delta and self.delta(adapter_name).mergeable
