"""What a run will take of memory and disk, counted on an outline of the model: shapes without numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...adapters import AdapterConfig
from ...adapters.config import Start
from ...loaders.inject import inject
from ...pipelines.components import component, denoiser_name, nora_layers
from .denoiser import empty_embeddings, predict

OVERHEAD = 1.15
"""Workspaces and fragmentation, over what is counted."""
NAME_BYTES = 384
"""What the headers of a checkpoint's files say of each factor and its moments."""


@dataclass(frozen=True)
class Estimate:
    """Numbers of an adapter, and the bytes that the denoiser keeps of a batch's forward pass for its backward."""

    trained: int
    frozen_bytes: int
    factors: int
    activations: int

    @property
    def checkpoint_bytes(self) -> int:
        """What one checkpoint takes."""
        return checkpoint_bytes(self.trained, self.frozen_bytes, self.factors)

    @property
    def memory(self) -> int:
        """Bytes beside the loaded model: kept activations, the adapter, its gradients and AdamW's two moments."""
        return int(OVERHEAD * (self.activations + self.frozen_bytes + 16 * self.trained))


def checkpoint_bytes(trained: int, frozen_bytes: int, factors: int) -> int:
    """Of the adapter in fp32 with its frozen factors, of AdamW's two moments, and of the names of all these."""
    return frozen_bytes + 12 * trained + NAME_BYTES * factors


def estimate(
    pipe: Any, config: AdapterConfig, parts: list[str], rows: int, side: int, dtype: torch.dtype, checkpointing: bool
) -> Estimate:
    """Count for a batch of ``rows`` pictures of ``side`` pixels whose forward pass runs in ``dtype``.

    The denoiser runs once on the meta device with hooks on what autograd keeps; fused attention keeps q, k, v and its
    result. With gradient checkpointing, what one block keeps while it is recomputed is taken as one block's share.
    """
    trained = frozen = factors = 0
    activations = 0
    for part in parts:
        module = _shapes(component(pipe, part))
        with torch.device("meta"):
            inject(module, config, "outline", Start(empty=True))
        for layer in nora_layers(module, "outline").values():
            layer.set_scale("outline", 1.0)
        own = {name: value for name, value in module.state_dict(keep_vars=True).items() if ".nora_" in name}
        factors += len(own)
        trained += sum(value.numel() for value in own.values() if isinstance(value, nn.Parameter))
        size = torch.finfo(getattr(torch, config.basis_dtype)).bits // 8
        frozen += size * sum(value.numel() for value in own.values() if not isinstance(value, nn.Parameter))
        if part == denoiser_name(pipe):
            nn.Module.to(module, dtype).train()
            activations = saved_bytes(pipe, module, rows, side, dtype)
            if checkpointing:
                blocks = len({name.rpartition(".")[0] for name in own})
                module.enable_gradient_checkpointing()  # type: ignore[operator]
                activations = activations // blocks + saved_bytes(pipe, module, rows, side, dtype)
    return Estimate(trained, frozen, factors, activations)


def _shapes(module: nn.Module) -> nn.Module:
    """The same architecture without numbers, frozen."""
    kind: Any = type(module)
    with torch.device("meta"):
        empty: nn.Module = kind.from_config(module.config) if hasattr(kind, "from_config") else kind(module.config)
    return empty.requires_grad_(False)


def saved_bytes(pipe: Any, module: nn.Module, rows: int, side: int, dtype: torch.dtype) -> int:
    """Bytes of the storages that autograd keeps of one pass of ``module``, which stands for the pipeline's denoiser."""
    known = {value.untyped_storage()._cdata for value in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage  # held, so that its address stays its own
        return value

    settings: Any = module.config
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value)
    with torch.device("meta"), hooks, _FusedAttention():
        height = side // pipe.vae_scale_factor
        noisy = torch.empty(rows, pipe.vae.config.latent_channels, height, height, dtype=dtype)
        times = torch.zeros(rows, dtype=torch.long)
        labels = times if getattr(settings, "class_embed_type", None) == "timestep" else None
        predict(_Stand(pipe, module), noisy, times, empty_embeddings(settings, rows, dtype), labels)
    return sum(storage.nbytes() for storage in kept.values())


class _Stand:
    """A pipeline with another module for its denoiser."""

    def __init__(self, pipe: Any, module: nn.Module) -> None:
        self._pipe = pipe
        setattr(self, denoiser_name(pipe), module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


class _FusedAttention(TorchFunctionMode):
    """Attention as the fused kernels keep it; the meta device's own would keep the square matrix of scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        named = kwargs or {}
        if func is F.scaled_dot_product_attention:
            parts = (*args[:3], *(named[name] for name in ("query", "key", "value") if name in named))
            return _Attention.apply(*parts)  # type: ignore[no-untyped-call]
        return func(*args, **named)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        return out


def available(device: torch.device) -> int:
    """Bytes that a run on ``device`` can still get."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil  # type: ignore[import-untyped, unused-ignore]

    return int(psutil.virtual_memory().available)
