"""Attention processors that compute the adapter parts of q, k and v from one low-rank product.

They read the deltas of the tuner layers and match the output of those layers to 1e-6; only the speed differs. Text
encoders have no diffusers attention processors; their tuner layers run as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from .adapters import NoraLayer
from .adapters.deltas import functional
from .adapters.deltas.chain import ChainDelta, Delta
from .adapters.deltas.routed import RoutedDelta
from .adapters.tuner.offloading import is_offloaded
from .errors import UserError
from .pipelines.components import denoiser

Part = tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]
"""``(A [K, d_in], add)``: ``add(y, p)`` adds to the output ``y`` what follows from ``p = A x``."""
Kinds = tuple[type[nn.Module], ...]
STOCK = ("AttnProcessor", "AttnProcessor2_0")
"""diffusers' processors that compute the same attention as ours; any other is not replaced."""


def set_adapter_processors(pipe: Any, processor: AdapterAttnProcessor | None = None) -> int:
    """Set a fused processor in the denoiser's attention layers; return the number of layers.

    ``processor``: one for a single kind of adapter (default: for every kind). Layers with a custom processor (an
    IP-Adapter's, say) keep it. Raises :class:`UserError` if no layer has one of diffusers' standard processors.
    """
    model = denoiser(pipe)
    processor = processor or AdapterAttnProcessor()
    current = dict(getattr(model, "attn_processors", {}))
    stock = {path: p for path, p in current.items() if type(p).__name__ in STOCK or isinstance(p, AdapterAttnProcessor)}
    if not stock:
        kinds = sorted({type(p).__name__ for p in current.values()})
        raise UserError(f"the {type(model).__name__} has no standard diffusers attention, only {', '.join(kinds)}")
    processor.replaced = {path: getattr(p, "replaced", {}).get(path, p) for path, p in stock.items()}
    model.set_attn_processor({path: processor if path in stock else p for path, p in current.items()})
    return len(stock)


def remove_adapter_processors(pipe: Any) -> None:
    """Restore the processor that each attention layer had before :func:`set_adapter_processors`."""
    model = denoiser(pipe)
    model.set_attn_processor(
        {
            path: p.replaced.get(path, AttnProcessor2_0()) if isinstance(p, AdapterAttnProcessor) else p
            for path, p in model.attn_processors.items()
        }
    )


def live_parts(layer: nn.Module, kinds: Kinds, dtype: torch.dtype, x: Tensor) -> list[Part] | None:
    """What the live adapters of a projection add to ``x``, if it can be fused; else ``None``: the layer must be called.

    It cannot if another tuner layer (an ordinary LoRA) wraps the layer, if it has a hook or is offloaded, or if a
    delta is in training mode, of another kind or has a magnitude (DoRA, which rescales the frozen output too). It need
    not where the layer adds the update to its weight.
    """
    if not isinstance(layer, NoraLayer) or layer.rows is not None or (layer.merged and layer.disable_adapters):
        return None
    if layer._forward_hooks or layer._forward_pre_hooks or torch.is_grad_enabled() or is_offloaded(layer.base_layer):
        return None
    single, pair = layer.live(dtype)
    if pair is not None and ChainDelta not in kinds:
        return None
    if pair is not None and not single and layer.owns_output and layer.folds(x, dtype):
        return None
    deltas = {name: layer.delta(name) for name in single}
    if not all(isinstance(d, kinds) and not d.training and getattr(d, "m", None) is None for d in deltas.values()):
        return None
    parts = [_single_part(layer.live_scale(name), delta) for name, delta in deltas.items()]
    if pair is not None:
        down, up = pair
        parts.append((down, partial(functional.add_product, up=up, in_place=not parts and layer.owns_output)))
    return parts


def _single_part(scaling: float | Tensor, delta: Delta) -> Part:
    return delta.skinny_weight(), lambda y, p: y + scaling * delta.from_skinny(p).to(y.dtype)


def project(layers: Sequence[nn.Module], x: Tensor, kinds: Kinds) -> list[Tensor]:
    """``[layer(x) for layer in layers]``, with the adapters' down-projections of ``x`` in one product."""
    dtype = functional.compute_dtype(x)
    groups = [live_parts(layer, kinds, dtype, x) for layer in layers]
    weights = [down.to(dtype) for group in groups for down, _ in group or []]
    if not weights:
        return [layer(x) for layer in layers]
    products = F.linear(x, torch.cat(weights) if len(weights) > 1 else weights[0])
    downs = iter(products.split([len(w) for w in weights], dim=-1))
    outputs = []
    for layer, group in zip(layers, groups, strict=True):
        y: Tensor = layer(x) if group is None else layer.base_layer(x)  # type: ignore[operator]
        for _, add in group or []:
            y = add(y, next(downs))
        outputs.append(y)
    return outputs


class AdapterAttnProcessor:
    """Scaled dot-product attention like diffusers' ``AttnProcessor2_0``, with fused adapter projections."""

    delta_kinds: ClassVar[Kinds] = (ChainDelta, RoutedDelta)

    def __init__(self) -> None:
        self.replaced: dict[str, Any] = {}
        """The processor that each layer had before, by path."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query, key, value = self._query_key_value(attn, hidden_states, encoder_hidden_states)
        mask = _mask(attn, attention_mask, key)
        query, key, value = (_split_heads(t, attn.heads) for t in (query, key, value))
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attn.scale)
        out = out.transpose(1, 2).flatten(2).to(query.dtype)
        (out,) = project([attn.to_out[0]], out, self.delta_kinds)
        out = attn.to_out[1](out)
        if len(shape) == 4:
            out = out.transpose(1, 2).reshape(shape)
        out = out + residual if attn.residual_connection else out
        return out / attn.rescale_output_factor

    def _query_key_value(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None
    ) -> list[Tensor]:
        if encoder_hidden_states is None:
            return project([attn.to_q, attn.to_k, attn.to_v], hidden_states, self.delta_kinds)
        if attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        return [
            *project([attn.to_q], hidden_states, self.delta_kinds),
            *project([attn.to_k, attn.to_v], encoder_hidden_states, self.delta_kinds),
        ]


class NoRAAttnProcessor(AdapterAttnProcessor):
    """Fuses chains (NoRA, LoRA-XS, LoRA): collapses the down-projections to rank ``r'`` and stacks them."""

    delta_kinds = (ChainDelta,)


class MoRAttnProcessor(AdapterAttnProcessor):
    """Fuses mixtures of ranks: stacks the shared ``A`` and the routers of q, k and v."""

    delta_kinds = (RoutedDelta,)


def _split_heads(tensor: Tensor, heads: int) -> Tensor:
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def _mask(attn: Attention, mask: Tensor | None, key: Tensor) -> Tensor | None:
    if mask is None:
        return None
    mask = attn.prepare_attention_mask(mask, key.shape[1], key.shape[0])
    return mask.view(key.shape[0], attn.heads, -1, mask.shape[-1])
