"""The tuner layer: a frozen projection (linear or convolution) with any number of named deltas."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ...errors import UserError
from ..config import AdapterConfig
from ..deltas import functional
from ..deltas.chain import ChainDelta
from ..deltas.joining import ScaledChain
from ..deltas.routed import RoutedDelta
from .build import build_delta, contraction
from .fixed_pair import FixedPair, Pair
from .live_pair import LivePair, is_plain_linear
from .merging import WeightMerge
from .offloading import is_offloaded, onloaded
from .peft_interface import AdapterState, PeftInterface, RowServer, is_filled, move_filled

if TYPE_CHECKING:
    from typing_extensions import Self


class NoraLayer(nn.Module, PeftInterface):
    """``y = base(x) + sum_k scaling_k * delta_k(x)`` over the active, unmerged adapters ``k``.

    It always sits innermost, directly around the ``nn.Linear`` or ``nn.Conv2d``; tuner layers of other methods wrap
    it. Merging keeps a copy of the weight, so that unmerging restores it bit for bit.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        if isinstance(base_layer, nn.Conv2d) and base_layer.groups != 1:
            raise UserError(f"grouped convolutions (groups={base_layer.groups}) cannot be adapted: exclude them")
        self.base_layer = base_layer
        self.nora_delta = nn.ModuleDict()
        self.states: dict[str, AdapterState] = {}
        self.merging = WeightMerge()
        self._active_adapter: list[str] = []
        self._disable_adapters = False
        self.contract = contraction(base_layer)
        """Applies a down-projection ``[k, d_in]`` to an input of this layer: ``p [..., k]``."""
        self.rows: RowServer | None = None
        self.live_pair = LivePair()
        self.nora_fixed: FixedPair | None = None
        self.register_load_state_dict_post_hook(_refresh)  # type: ignore[no-untyped-call]

    def update_layer(self, adapter_name: str, config: AdapterConfig, key: str) -> None:
        """Add one adapter, active and at weight 1."""
        delta = build_delta(config, self.base_layer, key)
        move_filled(delta, self._weight.device)
        self.nora_delta[adapter_name] = delta.train(self.base_layer.training)
        scale = config.scale_for(key)
        # Without factors yet it must add nothing: the loader that fills them also sets the weight.
        scaling = 0.0 if config.start.empty else scale
        self.states[adapter_name] = AdapterState(config.rank_for(key), scale, scaling, self._weight.device)
        if config.magnitude:
            self.merging.pin(self._weight)
        self.activate([*self.active, adapter_name], inference=config.inference_mode)

    @property
    def _weight(self) -> Tensor:
        return cast(Tensor, self.base_layer.weight)

    def live_names(self) -> Iterator[str]:
        """Names of the adapters that ``forward`` adds now."""
        if self.disable_adapters:
            return
        for name in self.active:
            # A compiled graph must not read the number: it would be recompiled for each value.
            counts = name in self.states and (torch.compiler.is_compiling() or self.states[name].scaling != 0)
            if counts and name not in self.merging.scalings:
                yield name

    def live_scale(self, adapter: str) -> float | Tensor:
        """The scaling as ``forward`` uses it: in a compiled graph a tensor, so that one graph serves every weight."""
        state = self.states[adapter]
        return state.scaling_tensor if torch.compiler.is_compiling() else state.scaling

    # Forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # In this order: the graph of a prepared layer must not depend on whether its adapters are disabled.
        if self.merging.scalings and self.disable_adapters:
            self.unmerge()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            fused = self._fused(x)
            if fused is not None:
                return fused
        layer, own = self.base_layer, self.owns_output
        if own and self.rows is None:
            return self._plain(x)
        base: Tensor = layer(x, *args, **kwargs)
        if own or not is_offloaded(layer):
            return self._adapted(x, base, own)
        fixed = [] if self.nora_fixed is None else [self.nora_fixed]
        with onloaded(self.nora_delta, *fixed, *([layer] if self._rescales() else [])):
            return self._adapted(x, base, own)

    def _fused(self, x: Tensor) -> Tensor | None:
        """The output, if the only live adapter trains in one function with the projection."""
        base: Any = self._modules["base_layer"]  # the lookup of nn.Module is slow
        if not is_plain_linear(base) or base.weight.requires_grad:
            return None
        if self.rows is not None:
            return None if self.disable_adapters else self.rows.fused(x)
        names = list(self.live_names())
        if len(names) != 1:
            return None
        delta: Any = self._modules["nora_delta"]._modules[names[0]]  # type: ignore[union-attr]
        if not delta.fuses:
            return None
        y: Tensor = delta.linear(x, base.weight, base.bias, self.states[names[0]].scaling)
        return y

    def _adapted(self, x: Tensor, base: Tensor, own: bool) -> Tensor:
        """The output for an input whose frozen output is ``base``; ``own``: it may be overwritten."""
        if self.rows is not None and not self.disable_adapters:
            return self.rows.add(x, base)
        return self._with(*self.live(base.dtype), x, base, own)

    def _plain(self, x: Tensor) -> Tensor:
        """The output of a plain linear projection outside of mixed batches."""
        dtype = functional.compute_dtype(x)
        single, pair = self.live(dtype)
        if pair is not None and not single and self.folds(x, dtype):
            down, up = pair
            return F.linear(x, torch.addmm(self._weight, up, down), cast("Tensor | None", self.base_layer.bias))
        return self._with(single, pair, x, self.base_layer(x), own=True)

    def _with(self, single: Sequence[str], pair: Pair | None, x: Tensor, base: Tensor, own: bool) -> Tensor:
        """The frozen output with what these live adapters add."""
        y = base
        for name in single:
            scaling, dy = self.contribution(name, x, base)
            y = y + scaling * dy.to(y.dtype)
        return y if pair is None else self._with_pair(*pair, x, y, own)

    def live(self, dtype: torch.dtype) -> tuple[list[str], Pair | None]:
        """Names of the live adapters that are added one by one, and the pair of all others in ``dtype``, if any."""
        fixed = self.nora_fixed
        if fixed is not None and fixed.serves and not self.training and not torch.is_grad_enabled():
            return fixed.others, fixed.pair(dtype)
        names = list(self.live_names())
        chains = self.joined_chains(names)
        pair = self.live_pair.get(list(chains.values()), dtype) if chains else None
        return [name for name in names if name not in chains], pair

    def _with_pair(self, down: Tensor, up: Tensor, x: Tensor, y: Tensor, own: bool) -> Tensor:
        """``y + B A x``; ``own``: ``y`` may be overwritten."""
        p = self.contract(x, down)
        if isinstance(self.base_layer, nn.Conv2d):
            return y + self.channels_first(F.linear(p, up))
        return functional.add_product(y, p, up, in_place=own)

    @property
    def owns_output(self) -> bool:
        """Whether the frozen output belongs to nobody else, so that an update may be added to it in place."""
        return is_plain_linear(self.base_layer) and not torch.compiler.is_compiling()

    def folds(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether a pass of a plain linear layer in ``dtype`` adds ``B A`` to ``W``, and not ``B A x`` to ``y``.

        It does where ``W`` has fewer values than ``x`` and ``y``, so that the update is one pass over ``W``, and not
        one over ``x`` and two over ``y``. In half precision, rounding it adds no more error than rounding ``y`` does.
        """
        d_out, d_in = self._weight.shape
        return self._weight.dtype == dtype and d_out * d_in <= x.numel() // d_in * (d_in + d_out)

    def joined_chains(self, names: Sequence[str]) -> dict[str, ScaledChain]:
        """Those of the live adapters that a pass without gradients adds as one pair, by name."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return {}
        deltas: Any = self._modules["nora_delta"]._modules  # type: ignore[union-attr]  # ModuleDict's lookup is slow
        return {
            name: (self.states[name].scaling, deltas[name])
            for name in names
            if isinstance(deltas[name], ChainDelta) and deltas[name].is_plain
        }

    def contribution(
        self, adapter: str, x: Tensor, base: Tensor, rows: Tensor | None = None
    ) -> tuple[float | Tensor, Tensor]:
        """``(scaling, dy)`` of one adapter for an input and its frozen output.

        ``rows``: the indices in the batch of the rows of ``x``, if ``x`` is only a part of it.
        """
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
            native = self.states[adapter].native_scale
            dy = self._rescaled(dy, factors, native, x, base)
            scaling = scaling / native
        return scaling, dy

    def channels_first(self, dy: Tensor) -> Tensor:
        """``dy [..., d_out]`` in the layout of the layer's output."""
        return dy.movedim(-1, 1) if isinstance(self.base_layer, nn.Conv2d) else dy

    # Preparation for torch.compile

    def prepare(self, path: str, max_rank: int | None) -> None:
        """Serve passes without gradients from a :class:`.FixedPair`, or (``None``) from the adapters again.

        Raises :class:`UserError` if the live adapters need more than ``max_rank``.
        """
        self.nora_fixed = None if max_rank is None else FixedPair(self.base_layer, path, max_rank)
        self.refresh()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def refresh(self) -> None:
        """Write the live adapters into the fixed pair, if there is one; called after each change of the adapters.

        Raises as :meth:`.FixedPair.write`.
        """
        if self.nora_fixed is None or self.rows is not None:
            return
        names = list(self.live_names())
        chains = {name: chain for name, chain in self.joined_chains(names).items() if is_filled(chain[1])}
        self.nora_fixed.write(list(chains.values()), [name for name in names if name not in chains])

    def train(self, mode: bool = True) -> Self:
        """Set the mode of training; factors that were trained enter the fixed pair when training ends."""
        super().train(mode)
        if not mode:
            self.refresh()
        return self

    # DoRA

    def row_factors(self, adapter: str, working: bool = False) -> Tensor | None:
        """DoRA's factor of each output row of the frozen weight, ``[d_out]``; ``None`` without a magnitude.

        ``working``: at the rank of a training pass.
        """
        delta = self.delta(adapter)
        if not isinstance(delta, ChainDelta) or delta.m is None:
            return None
        rank = delta.working_rank if working else delta.rank
        frozen = self.merging.frozen(self._weight).flatten(1)
        return delta.row_factors(frozen, self.states[adapter].native_scale, rank)

    def _rescaled(self, dy: Tensor, factors: Tensor, scale: float, x: Tensor, base: Tensor) -> Tensor:
        """``(c - 1) W x + c s dy``. The bias is left out of ``W x``, so that a weight of 0 gives the base."""
        is_conv = isinstance(self.base_layer, nn.Conv2d)
        bias = cast("Tensor | None", self.base_layer.bias)
        if self.merging.clean is not None:
            plain = self.channels_first(self.contract(x, self.merging.frozen(self._weight).flatten(1)))
        else:
            bias = None if bias is None else (bias.view(-1, 1, 1) if is_conv else bias).to(base.dtype)
            plain = base if bias is None else base - bias
        factors = factors.view(-1, 1, 1) if is_conv else factors
        return (factors - 1) * plain + factors * scale * dy

    def _rescales(self) -> bool:
        """Whether an adapter has a magnitude, for which the frozen weight is read."""
        return any(getattr(delta, "m", None) is not None for delta in self.nora_delta.values())

    # Merging

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``scaling * dW`` in the shape of the base weight, fp32."""
        return self._change(adapter, self.states[adapter].scaling)

    def _change(self, adapter: str, scaling: float) -> Tensor:
        dw, factors, shape = self.delta(adapter).delta_weight(), self.row_factors(adapter), self._weight.shape
        if factors is None:
            return (scaling * dw).view(shape)
        frozen = self.merging.frozen(self._weight).flatten(1)
        scale, factors = self.states[adapter].native_scale, factors.unsqueeze(1)
        change = (factors - 1) * frozen + factors * scale * dw
        return (scaling / scale * change).view(shape)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active adapters' ``dW`` to the weight; one that has none (MoR) stays live, with a warning."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.nora_delta]
        routed = [n for n in names if not self.delta(n).mergeable]
        if routed:
            warnings.warn(f"{', '.join(routed)}: a routed adapter cannot be merged; it stays live", stacklevel=2)
        self._merge({n: self.states[n].scaling for n in names if n not in routed}, safe_merge)

    def _merge(self, scalings: dict[str, float], safe_merge: bool = False) -> None:
        rescales = self._rescales()
        # A magnitude reads the frozen weight: it is saved even if only a LoRA around this layer is being fused.
        if scalings or rescales:
            self.merging.merge(self._weight, scalings, self._change, rescales=rescales, safe=safe_merge)
            self.refresh()

    def unmerge(self) -> None:
        """Take all merged adapters out; bit for bit unless another tool changed the merged weight meanwhile."""
        self.merging.unmerge(self._weight, self._change)
        self.refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove one adapter, from the merged weight too: it is unmerged, and the others are merged again."""
        others: dict[str, float] = {}
        if adapter_name in self.merging.scalings:
            others = {n: s for n, s in self.merging.scalings.items() if n != adapter_name}
            self.unmerge()
        self.states.pop(adapter_name, None)
        self.live_pair.clear()  # it holds the deltas
        if adapter_name in self.nora_delta:
            del self.nora_delta[adapter_name]
        # Not `activate`, which would set requires_grad of the other adapters.
        self._active_adapter = [name for name in self.active if name != adapter_name]
        self.refresh()
        if others:
            self._merge(others)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast each tensor once: ``nn.Module`` would give every adapter its own copy of a shared basis."""
        done: dict[int, tuple[Tensor, Tensor]] = {}

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in done:
                done[id(tensor)] = tensor, fn(tensor)
            return done[id(tensor)][1]

        super()._apply(once, recurse)  # type: ignore[no-untyped-call]
        self.live_pair.clear()
        self.merging.repin(self._weight)
        for state in self.states.values():
            state.move(self._weight.device)
        self.refresh()
        return self


def _refresh(layer: NoraLayer, _: object) -> None:
    """Other tools fill factors by ``load_state_dict``."""
    layer.refresh()
