"""The tuner layer: a frozen projection (linear or convolution) with any number of named deltas."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..errors import UserError
from . import functional
from .bases import BASES, Pair
from .config import AdapterConfig
from .cores import DenseCore, NestedCore
from .deltas import ChainDelta, Core, Delta
from .routed import RoutedDelta


def flat_weight(base: nn.Module) -> Tensor:
    """The weight as a matrix ``[d_out, d_in]``; a convolution's is unfolded to ``[d_out, c * kh * kw]``."""
    return cast(Tensor, base.weight).flatten(1)


def build_core(config: AdapterConfig, r: int) -> Core | None:
    """The core axis of ``config`` for an outer rank ``r``."""
    if config.core == "nested":
        return NestedCore(r, min(config.inner_r, r))
    return DenseCore(r) if config.core == "dense" else None


def build_basis(config: AdapterConfig, base: nn.Module, key: str, r: int) -> Pair:
    """The outer pair of one projection in the numbers that the layer works with: new, or at hand in ``start``."""
    weight = flat_weight(base)
    if config.start.empty:
        shapes = (r, weight.shape[1]), (weight.shape[0], r)
        return weight.new_empty(shapes[0], dtype=torch.float32), weight.new_empty(shapes[1], dtype=torch.float32)
    down, up = config.start.pairs.get(key) or outer_pair(config, base, key, r)
    return (down.to(weight.dtype), up.to(weight.dtype)) if config.frozen_outer else (down, up)


def outer_pair(config: AdapterConfig, base: nn.Module, key: str, r: int) -> Pair:
    """Compute an outer pair; a frozen one is rounded to ``basis_dtype``, so that saving it loses nothing."""
    weight = flat_weight(base).detach()
    strength = config.start.strengths.get(key)
    if config.basis == "awsvd" and strength is None:
        raise UserError(
            "the 'awsvd' basis needs activation statistics: use nora_diffusion.add_adapter, which calibrates, "
            "or basis='svd'"
        )
    if strength is not None:
        strength = strength.repeat_interleave(weight.shape[1] // strength.numel()).to(weight.device)
    down, up = BASES[config.basis](weight, r, strength, placement=config.placement, power=config.power)
    storage = getattr(torch, config.basis_dtype) if config.frozen_outer else torch.float32
    # Contiguous, because safetensors stores plain tensors only.
    return down.to(storage).contiguous(), up.to(storage).contiguous()


def build_delta(config: AdapterConfig, base: nn.Module, key: str) -> Delta:
    """The delta that ``config`` describes for the projection ``base`` at path ``key``."""
    r = min(config.rank_for(key), *flat_weight(base).shape)
    down, up = build_basis(config, base, key, r)
    if config.router == "token":
        if isinstance(base, nn.Conv2d) and base.kernel_size != (1, 1):
            raise UserError(f"a token router cannot gate the {base.kernel_size} convolution {key!r}: leave it out")
        return RoutedDelta(down, up, config.num_experts, config.dropout)
    return ChainDelta(down, up, build_core(config, r), config.dropout)


def contraction(base: nn.Module) -> functional.Contract:
    """How a down-projection is applied to the input of ``base``."""
    if isinstance(base, nn.Conv2d):
        return functools.partial(
            functional.contract_conv,
            kernel_size=cast("tuple[int, int]", base.kernel_size),
            stride=cast("tuple[int, int]", base.stride),
            padding=cast("tuple[int, int] | str", base.padding),
            dilation=cast("tuple[int, int]", base.dilation),
        )
    return functional.contract_linear


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

    def live(self) -> Iterator[tuple[float, Delta]]:
        """``(scaling, delta)`` of every adapter that ``forward`` adds now."""
        if self.disable_adapters:
            return
        for name in self.active:
            if name in self.nora_delta and name not in self.merged_adapters and self.scaling[name] != 0:
                yield self.scaling[name], self.delta(name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y: Tensor = self.base_layer(x, *args, **kwargs)
        for scaling, delta in self.live():
            if torch.is_grad_enabled() or delta.training:
                dy = delta(x, self._contract)
            else:
                dy = delta.from_skinny(self._contract(x, delta.skinny_weight()))
            if isinstance(self.base_layer, nn.Conv2d):
                dy = dy.movedim(-1, 1)
            y = y + scaling * dy.to(y.dtype)
        return y

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
        weight = cast(Tensor, self.base_layer.weight)
        return (self.scaling[adapter] * self.delta(adapter).delta_weight()).view(weight.shape)

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
