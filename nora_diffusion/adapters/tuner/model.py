"""The PEFT tuner: wraps the targeted projections in :class:`NoraLayer`, innermost."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ...errors import UserError
from ..config import AdapterConfig
from ..peft_names import PREFIX
from .build import flat_weight
from .guards import guard, unguard
from .layer import NoraLayer
from .mixed_rows import serve_rows
from .rank_mask import watch
from .row_plan import RowPlan
from .weighted import lora_config, weighted_pairs


class NoraModel(BaseTuner):
    """One tuner for every method of this package; the fields of the config select the method."""

    prefix = PREFIX
    tuner_layer_cls = NoraLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _create_and_replace(
        self,
        peft_config: AdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        # Tuner layers of other methods (an ordinary LoRA, say) stay outside: their keys and outputs must not change.
        while isinstance(target, BaseTunerLayer) and not isinstance(target, NoraLayer):
            parent, target_name, target = target, "base_layer", target.base_layer
        if not isinstance(target, NoraLayer):
            if not isinstance(target, nn.Linear | nn.Conv2d):
                if isinstance(peft_config.target_modules, str):
                    return  # a pattern may match any path, but a listed name means a projection
                raise UserError(
                    f"{current_key!r} is a {type(target).__name__}: only linear and conv layers can be adapted"
                )
            layer = NoraLayer(target).train(target.training)
            layer.update_layer(adapter_name, peft_config, current_key)
            setattr(parent, target_name, layer)
        else:
            target.update_layer(adapter_name, peft_config, current_key)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """PEFT's injection. With ``low_cpu_mem_usage`` the factors come from a file, so no basis is computed."""
        config = self.peft_config[adapter_name]
        start = config.start
        # PEFT either passes the option or only enters its context, in which parameters are created on the meta device.
        from_file = (low_cpu_mem_usage or _creates_on_meta()) and not start.empty
        try:
            config.start = replace(start, empty=start.empty or from_file)
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        finally:
            config.start = start
        if from_file:  # PEFT's loader fills the factors, but activates nothing
            for layer in self.nora_layers(adapter_name):
                layer.set_scale(adapter_name, 1.0)
            self.set_adapter(self.active_adapters, config.inference_mode)

    def nora_layers(self, adapter_name: str) -> list[NoraLayer]:
        """The layers that hold an adapter."""
        return [m for m in self.model.modules() if isinstance(m, NoraLayer) and adapter_name in m.nora_delta]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """``autocast_adapter_dtype=False`` casts the trained factors, created in fp32, to the base's dtype."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in [] if autocast_adapter_dtype else self.nora_layers(adapter_name):
            weight = flat_weight(layer.base_layer)
            if weight.is_floating_point() and weight.itemsize > 1:  # not the 8 bits of a quantized weight
                for parameter in layer.delta(adapter_name).parameters():
                    parameter.data = parameter.data.to(weight.dtype)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Ignore the call with which PEFT activates a new adapter alone, if it is still to be filled from a file."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if not any(self.peft_config[name].start.empty for name in names):
            super().set_adapter(adapter_name, inference_mode=inference_mode)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """Serve PEFT's ``adapter_names``: one name for each row of the batch, ``"__base__"`` for the base alone."""
        names: list[str] | None = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        unknown = set(names) - set(self.peft_config) - {"__base__"}
        if unknown:
            raise UserError(f"there is no adapter named {sorted(unknown)[0]!r}: it has {', '.join(self.peft_config)}")
        if any(layer.merged for layer in self.model.modules() if isinstance(layer, BaseTunerLayer)):
            raise UserError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        plan = RowPlan([{} if name == "__base__" else {name: 1.0} for name in names], exact=True)
        with serve_rows(self.model, plan):
            yield

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
    ) -> None:
        """Add a plain LoRA that is the weighted sum of adapters, inactive; see :func:`.weighted.weighted_pairs`.

        Raises :class:`UserError` for a name that is taken, and as that function.
        """
        if adapter_name in self.peft_config:
            raise UserError(f"an adapter named {adapter_name!r} exists already: delete it or choose another name")
        pairs = weighted_pairs(self.model, adapters, weights, combination_type, svd_rank)
        self.peft_config[adapter_name] = lora_config(pairs)
        self.inject_adapter(self.model, adapter_name)
        for path, layer in self.model.named_modules():
            if isinstance(layer, NoraLayer) and adapter_name in layer.nora_delta:
                delta, pair = layer.delta(adapter_name), pairs.get(path.replace(".base_layer", ""))
                for factor, value in zip(("A", "B"), pair or (), strict=False):
                    delta.get_parameter(factor).data.copy_(value)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if none is active then, activate another one. Raises ``ValueError`` for a merged one."""
        super().delete_adapter(adapter_name)
        if self.peft_config and not self.active_adapter:
            self.set_adapter(min(self.peft_config))

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        """PEFT's ``merge_and_unload()`` and ``unload()``; raises :class:`UserError` if that would drop an adapter."""
        layers = [layer for layer in self.model.modules() if isinstance(layer, BaseTunerLayer)]
        if any(isinstance(layer.base_layer, NoraLayer) for layer in layers):
            raise UserError(
                "an adapter of another method wraps this one, and PEFT would unload both but merge only the outer: "
                "merge and unload them through the pipeline (fuse_lora, unload_lora_weights)"
            )
        routed = {n for layer in layers if isinstance(layer, NoraLayer) for n in layer.live_names() if merge
                  and not layer.delta(n).mergeable}  # fmt: skip
        if routed:
            raise UserError(f"{', '.join(sorted(routed))}: a routed adapter cannot be merged, and unloading drops it")
        model: nn.Module = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        unguard(model)
        return model

    def _post_injection_hook(self, model: nn.Module, config: AdapterConfig, adapter_name: str) -> None:
        guard(model)
        if config.rank_mask:
            watch(model)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        key = re.sub(r"(?<!\.base_layer)(\.base_layer)+\.nora_", ".nora_", key)
        return key.replace(f".nora_delta.{adapter_name}.", ".nora_delta.", 1)


def _creates_on_meta() -> bool:
    """Whether new parameters are created on the meta device. Draws no random numbers, unlike a layer's constructor."""
    module = nn.Module()
    module.register_parameter("probe", nn.Parameter(torch.empty(0)))
    return next(module.parameters()).is_meta
