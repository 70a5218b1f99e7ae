"""Inputs of routers other than the token: the prompt and the timestep of each row of a denoiser's batch.

- ``prompt``: the mean over the tokens of ``encoder_hidden_states``, padding included (SD 1.x, 2.x: CLIP's states;
  SDXL: the concatenated states of both encoders; SD3: CLIP's and T5's; Flux: T5's).
- ``timestep``: the vector that modulates the denoiser's blocks. In a UNet it is ``emb``, which every block receives as
  ``temb``: the embedded timestep, plus the embedded class labels and, in SDXL, the embedded pooled text and sizes. In a
  transformer it is the output of the time embedding: ``time_text_embed`` (SD3, Flux: timestep, guidance, pooled text),
  ``adaln_single`` or ``time_embed`` (PixArt, Sana: the embedded timestep before its linear map) or a similar module.
- ``prompt+timestep``: both, concatenated.

Text encoders have neither; there such an adapter gets the ``token`` router, or none (:func:`router_for`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from ..adapters import AdapterConfig, NoraLayer
from ..adapters.deltas.routed import Block, RoutedDelta, RouterInputs
from ..adapters.targets import block_of
from ..errors import UserError

PROMPT_WIDTHS = ("encoder_hid_dim", "caption_channels", "joint_attention_dim", "cap_feat_dim", "cross_attention_dim")
"""Config entries that give the width of ``encoder_hidden_states``; the first one that is set counts."""
TIME_MODULES = (
    "time_embedding", "time_text_embed", "time_guidance_embed", "time_caption_embed", "time_embed", "time_step_proj",
    "adaln_single",
)  # fmt: skip
"""Attributes in which denoisers hold their time embedding."""


def router_for(config: AdapterConfig, component: str) -> AdapterConfig:
    """``config`` for one component: text encoders, which have no prompt vector and no timestep, route by token.

    Where the modules of a block are the experts, those of text encoders have no gate.
    """
    if config.router in ("none", "token") or not component.startswith("text_encoder"):
        return config
    own = copy.deepcopy(config)
    own.router = "token"
    if config.experts == "modules":  # no gate that the modules of a block could share: a plain LoRA
        own.router, own.experts = "none", "shared"
    own.top_k = 0
    return own


def router_input_width(model: nn.Module, router: str) -> int:
    """The width of a router's input vector; 0 for ``none`` and ``token``.

    Raises :class:`UserError` for a model without such an input.
    """
    if router in ("none", "token"):
        return 0
    return sum(prompt_width(model) if name == "prompt" else time_embedding(model)[1] for name in router.split("+"))


def prompt_width(model: nn.Module) -> int:
    """The width of a denoiser's ``encoder_hidden_states``."""
    config: Mapping[str, Any] = getattr(model, "config", {}) if _is_denoiser(model) else {}
    width = next((config[name] for name in PROMPT_WIDTHS if config.get(name)), None)
    if width is None:
        raise UserError(f"{type(model).__name__} gets no prompt that a router could use: use router='token'")
    return int(width[0] if isinstance(width, list | tuple) else width)


def time_embedding(model: nn.Module) -> tuple[nn.Module, int]:
    """The module whose input or output is the timestep's vector (a UNet's first block receives it), and the width."""
    module = next((m for name in TIME_MODULES if (m := getattr(model, name, None)) is not None), nn.Module())
    embedder = next((m for m in module.modules() if isinstance(m, TimestepEmbedding)), None)
    if embedder is None or not _is_denoiser(model):
        raise UserError(f"{type(model).__name__} has no time embedding that a router could use: use router='token'")
    width = int(embedder.linear_2.out_features)
    if not _is_unet(model):
        return module, width
    doubled = bool(getattr(model, "config", {}).get("class_embeddings_concat"))
    return model.down_blocks[0], width * (2 if doubled else 1)  # type: ignore[index, return-value]


def _is_denoiser(model: nn.Module) -> bool:
    return "encoder_hidden_states" in inspect.signature(model.forward).parameters


def _is_unet(model: nn.Module) -> bool:
    return hasattr(model, "down_blocks")


def connect(model: nn.Module) -> None:
    """Give the model's routed deltas their inputs through hooks; remove the hooks once no delta needs them.

    Call it after adapters were added or removed; repeated calls change nothing.
    """
    deltas = _with_inputs(model)
    names = {name for delta in deltas for name in delta.router.split("+")}
    hooks = connected(model)
    if hooks is not None and hooks.names != names:
        hooks.remove()
        hooks = None
    if names and hooks is None:
        hooks = RouterInputHooks(model, names)
    for delta in deltas:
        delta.router_inputs = hooks.router_inputs if hooks else None
    if hooks is not None:
        hooks.router_inputs.blocks = _blocks(model)


def _blocks(model: nn.Module) -> dict[Block, list[RoutedDelta]]:
    """The deltas that share a gate, by block and adapter, in the order of the model's modules."""
    found: dict[Block, list[RoutedDelta]] = {}
    for path, layer in model.named_modules():
        for name, delta in layer.nora_delta.items() if isinstance(layer, NoraLayer) else ():
            if isinstance(delta, RoutedDelta) and delta.by_block:
                delta.block = block_of(path), name
                found.setdefault(delta.block, []).append(delta)
    return found


def connected(model: nn.Module) -> RouterInputHooks | None:
    """The hooks of :func:`connect` on a model, if any; found among its forward hooks, which copies and pickles keep."""
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, RouterInputHooks)), None)


def _with_inputs(model: nn.Module) -> list[RoutedDelta]:
    return [m for m in model.modules() if isinstance(m, RoutedDelta) and m.conditioned]


class RouterInputHooks:
    """Forward hooks on one denoiser that fill its :class:`RouterInputs` during each forward pass.

    Gradient checkpointing runs layers again during the backward pass. When the backward pass reaches the output of a
    forward pass, the inputs of that forward pass are restored until the backward pass ends.
    """

    def __init__(self, model: nn.Module, names: set[str]) -> None:
        self.names = names
        self.router_inputs = RouterInputs()
        self._signature = inspect.signature(model.forward)
        self._running = False
        self._handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        if "timestep" in names:
            module, self._width = time_embedding(model)
            self._handles.append(
                module.register_forward_pre_hook(self._read_block_input, with_kwargs=True)
                if _is_unet(model)
                else module.register_forward_hook(self._read_embedding)
            )

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.router_inputs.was_read and not _with_inputs(model):
            self.remove()  # the adapters were deleted by diffusers or PEFT
            return
        self._running, self.router_inputs.was_read = True, False
        states = self._signature.bind_partial(*args, **kwargs).arguments.get("encoder_hidden_states")
        self.router_inputs.open({"prompt": states.flatten(1, -2).mean(1)} if isinstance(states, Tensor) else {})

    def _leave(self, model: nn.Module, args: Any, output: Any) -> None:
        vectors, self._running = self.router_inputs.vectors, False
        self.router_inputs.open({})
        sample = None if output is None else output[0]
        if isinstance(sample, Tensor) and sample.requires_grad:
            sample.register_hook(lambda _: self._reopen(vectors))

    def _reopen(self, vectors: dict[str, Tensor]) -> None:
        self.router_inputs.open(vectors)
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: self.router_inputs.open({}))

    def _read_block_input(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._set_timestep(kwargs.get("temb", args[1] if len(args) > 1 else None))

    def _read_embedding(self, _: nn.Module, args: Any, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        self._set_timestep(next((o for o in outputs if isinstance(o, Tensor) and o.shape[-1] == self._width), None))

    def _set_timestep(self, vector: Tensor | None) -> None:
        if self._running and vector is not None:
            prompt = self.router_inputs.vectors.get("prompt")
            rows = vector.shape[0] if prompt is None else prompt.shape[0]
            self.router_inputs.vectors["timestep"] = vector.expand(rows, -1)
