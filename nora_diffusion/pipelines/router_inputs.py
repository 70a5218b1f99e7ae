"""What routers look at beside the token: the prompt and the timestep of each row of a denoiser's batch.

- ``prompt``: the mean over the tokens of ``encoder_hidden_states`` as the denoiser is given them, padding included
  (SD 1.x, 2.x: CLIP's states; SDXL: both encoders' states side by side; SD3: CLIP's and T5's; Flux: T5's).
- ``timestep``: the vector that modulates the denoiser's blocks. In a UNet it is ``emb``, what every block receives as
  ``temb``: the embedded timestep, plus the embedded class labels and, in SDXL, the embedded pooled text and sizes. In a
  transformer it is the output of its time embedding: ``time_text_embed`` (SD3, Flux: timestep, guidance, pooled text),
  ``adaln_single`` or ``time_embed`` (PixArt, Sana: the embedded timestep before its linear map) and their like.
- ``prompt+timestep``: both, side by side.

Text encoders have neither: there such an adapter gets the ``token`` router.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from ..adapters import AdapterConfig
from ..adapters.deltas.routed import RoutedDelta, RouterInputs
from ..errors import UserError

PROMPT_WIDTHS = ("encoder_hid_dim", "caption_channels", "joint_attention_dim", "cap_feat_dim", "cross_attention_dim")
"""Config entries that give the width of ``encoder_hidden_states``, the first that is set counts."""
TIME_MODULES = (
    "time_embedding", "time_text_embed", "time_guidance_embed", "time_caption_embed", "time_embed", "time_step_proj",
    "adaln_single",
)  # fmt: skip
"""Names under which denoisers hold their time embedding."""


def router_for(config: AdapterConfig, part: str) -> AdapterConfig:
    """``config`` as a component gets it: a text encoder, which knows no prompt as a whole and no timestep, by token."""
    if config.router in ("none", "token") or not part.startswith("text_encoder"):
        return config
    own = copy.deepcopy(config)
    own.router = "token"
    return own


def router_input_width(model: nn.Module, router: str) -> int:
    """The width of what a router looks at; 0 for those that look at tokens or at nothing.

    Raises :class:`UserError` for a model that has no such condition.
    """
    if router in ("none", "token"):
        return 0
    return sum(prompt_width(model) if name == "prompt" else time_embedding(model)[1] for name in router.split("+"))


def prompt_width(model: nn.Module) -> int:
    """The width of a denoiser's ``encoder_hidden_states``."""
    config: Mapping[str, Any] = getattr(model, "config", {}) if _is_denoiser(model) else {}
    width = next((config[name] for name in PROMPT_WIDTHS if config.get(name)), None)
    if width is None:
        raise UserError(f"{type(model).__name__} is given no prompt that a router could look at: use router='token'")
    return int(width[0] if isinstance(width, list | tuple) else width)


def time_embedding(model: nn.Module) -> tuple[nn.Module, int]:
    """The module at which the timestep's vector is seen (a UNet's first block receives it), and the vector's width."""
    place = next((m for name in TIME_MODULES if (m := getattr(model, name, None)) is not None), nn.Module())
    embedder = next((m for m in place.modules() if isinstance(m, TimestepEmbedding)), None)
    if embedder is None or not _is_denoiser(model):
        raise UserError(f"{type(model).__name__} has no time embedding that a router could look at: use router='token'")
    width = int(embedder.linear_2.out_features)
    if not _is_unet(model):
        return place, width
    doubled = bool(getattr(model, "config", {}).get("class_embeddings_concat"))
    return model.down_blocks[0], width * (2 if doubled else 1)  # type: ignore[index, return-value]


def _is_denoiser(model: nn.Module) -> bool:
    return "encoder_hidden_states" in inspect.signature(model.forward).parameters


def _is_unet(model: nn.Module) -> bool:
    return hasattr(model, "down_blocks")


def connect(model: nn.Module) -> None:
    """Have the model's routed deltas see its conditions; take the hooks out when no delta needs them any more.

    Called whenever adapters come or go; calling it again changes nothing.
    """
    deltas = _conditioned(model)
    names = {name for delta in deltas for name in delta.router.split("+")}
    hooks = connected(model)
    if hooks is not None and hooks.names != names:
        hooks.remove()
        hooks = None
    if names and hooks is None:
        hooks = RouterInputHooks(model, names)
    for delta in deltas:
        delta.router_inputs = hooks.router_inputs if hooks else None


def connected(model: nn.Module) -> RouterInputHooks | None:
    """The hooks on a model, if any: found among the model's own, which its copies and pickles carry along."""
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, RouterInputHooks)), None)


def _conditioned(model: nn.Module) -> list[RoutedDelta]:
    return [m for m in model.modules() if isinstance(m, RoutedDelta) and m.conditioned]


class RouterInputHooks:
    """The hooks on one denoiser that fill in its :class:`RouterInputs` for the time of each forward pass.

    With gradient checkpointing, layers run again during the backward pass: when that reaches the output of a forward
    pass, the conditions of that very pass are put back until the backward pass ends.
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
            place, self._width = time_embedding(model)
            self._handles.append(
                place.register_forward_pre_hook(self._see_block, with_kwargs=True)
                if _is_unet(model)
                else place.register_forward_hook(self._see_embedding)
            )

    def remove(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.router_inputs.was_read and not _conditioned(model):
            self.remove()  # the adapters were deleted by another tool's call
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

    def _see_block(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._see(kwargs.get("temb", args[1] if len(args) > 1 else None))

    def _see_embedding(self, _: nn.Module, args: Any, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        self._see(next((o for o in outputs if isinstance(o, Tensor) and o.shape[-1] == self._width), None))

    def _see(self, vector: Tensor | None) -> None:
        if self._running and vector is not None:
            prompt = self.router_inputs.vectors.get("prompt")
            rows = vector.shape[0] if prompt is None else prompt.shape[0]
            self.router_inputs.vectors["timestep"] = vector.expand(rows, -1)
