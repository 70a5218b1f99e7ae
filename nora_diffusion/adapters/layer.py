"""The tuner layer: a frozen projection (linear or convolution) with any number of named deltas."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..errors import UserError
from .build import build_delta, contraction, flat_weight
from .config import AdapterConfig
from .deltas import ChainDelta, Delta


class NoraLayer(nn.Module, BaseTunerLayer):
    """``y = base(x) + sum_k scaling_k * delta_k(x)`` over the active, unmerged adapters ``k``.

    It always sits innermost, directly around the ``nn.Linear`` or ``nn.Conv2d``; tuner layers of other methods wrap
    it. Merging keeps a copy of the weight, so that unmerging restores it bit for bit.
    """

    adapter_layer_names = ("nora_delta",)
    other_param_names = ("r", "scaling", "nora_scale")

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
        self._clean_weight: Tensor | None = None
        self._contract = contraction(base_layer)

    def update_layer(self, adapter_name: str, config: AdapterConfig, key: str) -> None:
        """Add one adapter, active and at weight 1."""
        delta = build_delta(config, self.base_layer, key)
        delta.to(flat_weight(self.base_layer).device).train(self.base_layer.training)
        self.nora_delta[adapter_name] = delta
        self.r[adapter_name] = config.rank_for(key)
        self.nora_scale[adapter_name] = self.scaling[adapter_name] = config.scale_for(key)
        self.activate([*self.active, adapter_name], inference=config.inference_mode)

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
            if name in self.nora_delta and name not in self.merged_adapters and self.scaling[name] != 0:
                yield name

    def live(self) -> Iterator[tuple[float, Delta]]:
        """``(scaling, delta)`` of every adapter that ``forward`` adds now."""
        return ((self.scaling[name], self.delta(name)) for name in self.live_names())

    def row_factors(self, adapter: str) -> Tensor | None:
        """DoRA's factor of each output row of the frozen weight, ``[d_out]``; ``None`` without a magnitude."""
        delta = self.delta(adapter)
        if not isinstance(delta, ChainDelta):
            return None
        return delta.row_factors(self._frozen_weight().flatten(1), self.nora_scale[adapter])

    def _frozen_weight(self) -> Tensor:
        """The weight without what is merged into it."""
        weight = cast(Tensor, self.base_layer.weight).detach()
        return weight if self._clean_weight is None else self._clean_weight.to(weight)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        base: Tensor = self.base_layer(x, *args, **kwargs)
        y = base
        for name in self.live_names():
            delta, scaling = self.delta(name), self.scaling[name]
            if torch.is_grad_enabled() or delta.training:
                dy = delta(x, self._contract)
            else:
                dy = delta.from_skinny(self._contract(x, delta.skinny_weight()))
            if isinstance(self.base_layer, nn.Conv2d):
                dy = dy.movedim(-1, 1)
            factors = self.row_factors(name)
            if factors is not None:
                dy = self._rescaled(dy, factors, self.nora_scale[name], x, base)
                scaling = scaling / self.nora_scale[name]
            y = y + scaling * dy.to(y.dtype)
        return y

    def _rescaled(self, dy: Tensor, factors: Tensor, scale: float, x: Tensor, base: Tensor) -> Tensor:
        """DoRA: ``(c - 1) W x + c s dy`` with the bias left out of it, so that a weight of 0 is the base."""
        is_conv = isinstance(self.base_layer, nn.Conv2d)
        bias = cast("Tensor | None", self.base_layer.bias)
        if self.merged:
            plain = self._contract(x, self._frozen_weight().flatten(1))
            plain = plain.movedim(-1, 1) if is_conv else plain
        else:
            plain = base if bias is None else base - (bias.view(-1, 1, 1) if is_conv else bias)
        factors = factors.view(-1, 1, 1) if is_conv else factors
        return (factors - 1) * plain + factors * scale * dy

    # Scales, as diffusers sets them: `weight` is the user's factor on top of alpha / r.

    def set_scale(self, adapter: str, scale: float) -> None:
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.nora_scale[adapter]

    def scale_layer(self, scale: float) -> None:
        for name in self._active_here():
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        for name in self._active_here():
            if scale is None:
                self.scaling[name] = self.nora_scale[name]
            elif scale != 0:
                self.scaling[name] /= scale

    def _active_here(self) -> list[str]:
        return [name for name in self.active if name in self.nora_delta]

    # Merging

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``scaling * dW`` in the shape of the base weight, fp32."""
        weight, dw = self._frozen_weight(), self.delta(adapter).delta_weight()
        factors = self.row_factors(adapter)
        if factors is None:
            return (self.scaling[adapter] * dw).view(weight.shape)
        scale, factors = self.nora_scale[adapter], factors.unsqueeze(1)
        change = (factors - 1) * weight.flatten(1) + factors * scale * dw
        return (self.scaling[adapter] / scale * change).view(weight.shape)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active adapters' ``dW`` to the weight; one that has none (MoR) stays live, with a warning."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.nora_delta]
        routed = [n for n in names if not self.delta(n).mergeable]
        if routed:
            warnings.warn(f"{', '.join(routed)}: a routed adapter cannot be merged; it stays live", stacklevel=2)
        names = [n for n in names if n not in routed]
        if not names:
            return
        weight = cast(Tensor, self.base_layer.weight)
        clean = weight.detach().clone() if self._clean_weight is None else self._clean_weight
        merged = self._with_deltas(weight.detach(), names)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"merging {', '.join(names)} gives weights that are not finite: the adapter is broken")
        weight.data.copy_(merged)
        self._clean_weight = clean
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Take all merged adapters out; bit for bit unless another tool changed the merged weight meanwhile."""
        if not self.merged:
            return
        weight = cast(Tensor, self.base_layer.weight)
        clean = cast(Tensor, self._clean_weight).to(weight.device, weight.dtype)
        if torch.equal(weight.detach(), self._with_deltas(clean, self.merged_adapters)):
            weight.data.copy_(clean)
        else:
            weight.data.copy_(self._with_deltas(weight.detach(), self.merged_adapters, sign=-1.0))
        self.merged_adapters.clear()
        self._clean_weight = None

    def _with_deltas(self, weight: Tensor, names: list[str], sign: float = 1.0) -> Tensor:
        total = torch.stack([self.get_delta_weight(name) for name in names]).sum(0)
        return (weight.float() + sign * total).to(weight.dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove one adapter; what was merged is unmerged first, so that nothing of it remains in the weight."""
        if adapter_name in self.merged_adapters:
            others = [n for n in self.merged_adapters if n != adapter_name]
            self.unmerge()
            self._drop(adapter_name)
            if others:
                self.merge(adapter_names=others)
        else:
            self._drop(adapter_name)

    def _drop(self, adapter_name: str) -> None:
        active = [name for name in self.active if name != adapter_name]
        for table in (self.r, self.scaling, self.nora_scale):
            table.pop(adapter_name, None)
        if adapter_name in self.nora_delta:
            del self.nora_delta[adapter_name]
        self.activate(active)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may convert this adapter to a LoRA by an SVD of its ``dW``."""
        return adapter_name in self.nora_delta and self.delta(adapter_name).mergeable
