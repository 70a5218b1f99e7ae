"""Estimates the memory and disk space of a run with a copy of the model on the meta device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...adapters import AdapterConfig
from ...adapters.config import Start
from ...loaders.inject import inject
from ...pipelines.components import Modules, denoiser_name, nora_layers
from ...pipelines.names import DENOISERS
from .denoiser import empty_embeddings, predict

OVERHEAD = 1.15
"""Factor for workspaces and fragmentation."""
NAME_BYTES = 384
"""Header bytes in a checkpoint's files for each factor and its moments."""


_KNOWN: dict[str, Estimate] = {}
"""Estimates by everything that they depend on."""


@dataclass(frozen=True)
class Estimate:
    """Trained parameters, bytes of frozen factors, number of factors, and bytes of saved activations of a batch.

    ``copy_bytes``: of the frozen factors in the dtype of the pass, where that is another one, and of other copies.
    """

    trained: int
    frozen_bytes: int
    factors: int
    activations: int
    copy_bytes: int

    @property
    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint in bytes."""
        return checkpoint_bytes(self.trained, self.frozen_bytes, self.factors)

    @property
    def counted(self) -> int:
        """Bytes besides the loaded model: activations, adapter, its copies, gradients and AdamW's two moments."""
        return self.activations + self.frozen_bytes + self.copy_bytes + 16 * self.trained

    @property
    def memory(self) -> int:
        """The counted bytes with workspaces and fragmentation."""
        return int(OVERHEAD * self.counted)


def checkpoint_bytes(trained: int, frozen_bytes: int, factors: int) -> int:
    """Bytes of a checkpoint: adapter in fp32, frozen factors, AdamW's two moments, and file headers."""
    return frozen_bytes + 12 * trained + NAME_BYTES * factors


def estimate(
    pipe: Any,
    config: AdapterConfig,
    components: Modules,
    rows: int,
    side: int,
    dtype: torch.dtype,
    checkpointing: bool,
) -> Estimate:
    """Estimate for a batch of ``rows`` images of ``side`` pixels in ``dtype``.

    The denoiser runs once on the meta device, with hooks on the tensors that autograd saves; fused attention saves q,
    k, v and its output. With gradient checkpointing, recomputing one block is assumed to save an equal share. An
    estimate is kept: the subjects of a list and the points of a sweep share it.
    """
    sizes = pipe.vae_scale_factor, pipe.vae.config.latent_channels, rows, side, dtype, checkpointing
    modules = {name: (type(module).__name__, module.config) for name, module in components.items()}
    key = repr((type(pipe).__name__, sizes, modules, config.to_dict()))
    if key not in _KNOWN:
        _KNOWN[key] = _estimate(pipe, config, components, rows, side, dtype, checkpointing)
    return _KNOWN[key]


def _estimate(
    pipe: Any, config: AdapterConfig, components: Modules, rows: int, side: int, dtype: torch.dtype, checkpointing: bool
) -> Estimate:
    trained = frozen = factors = activations = 0
    basis_dtype: torch.dtype = getattr(torch, config.basis_dtype)
    for name, adapted in components.items():
        module = _on_meta(adapted)
        with torch.device("meta"):
            inject(module, config, "outline", Start(empty=True))
        for layer in nora_layers(module, "outline").values():
            layer.set_scale("outline", 1.0)
        own = {key: value for key, value in module.state_dict(keep_vars=True).items() if ".nora_" in key}
        factors += len(own)
        trained += sum(value.numel() for value in own.values() if isinstance(value, nn.Parameter))
        frozen += sum(value.numel() for value in own.values() if not isinstance(value, nn.Parameter))
        if name in DENOISERS:
            nn.Module.to(module, dtype).train()
            activations = saved_bytes(pipe, module, rows, side, dtype)
            if checkpointing:
                blocks = len({key.rpartition(".")[0] for key in own})
                module.enable_gradient_checkpointing()  # type: ignore[operator]
                activations = activations // blocks + saved_bytes(pipe, module, rows, side, dtype)
    copies = 0 if dtype == basis_dtype else dtype.itemsize * frozen
    return Estimate(trained, basis_dtype.itemsize * frozen, factors, activations, copies)


def _on_meta(module: nn.Module) -> nn.Module:
    """A frozen copy of the architecture on the meta device."""
    cls: Any = type(module)
    with torch.device("meta"):
        empty: nn.Module = cls.from_config(module.config) if hasattr(cls, "from_config") else cls(module.config)
    return empty.requires_grad_(False)


def saved_bytes(pipe: Any, module: nn.Module, rows: int, side: int, dtype: torch.dtype) -> int:
    """Bytes that autograd saves in one forward pass of ``module``, used as the pipeline's denoiser."""
    settings: Any = module.config
    with torch.device("meta"), saved_storages((*module.parameters(), *module.buffers())) as saved, _FusedAttention():
        height = side // pipe.vae_scale_factor
        noisy = torch.empty(rows, pipe.vae.config.latent_channels, height, height, dtype=dtype)
        times = torch.zeros(rows, dtype=torch.long)
        labels = times if getattr(settings, "class_embed_type", None) == "timestep" else None
        predict(_PipelineWith(pipe, module), noisy, times, empty_embeddings(settings, rows, dtype), labels)
    return sum(storage.nbytes() for storage in saved.values())


@contextmanager
def saved_storages(known: Iterable[Tensor]) -> Iterator[dict[int, torch.UntypedStorage]]:
    """The storages that autograd saves for backward inside the context, but for those of the tensors ``known``."""
    others = {value.untyped_storage()._cdata for value in known}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in others:
            saved[storage._cdata] = storage  # keeps it alive, so that its address is not reused
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        yield saved


class _PipelineWith:
    """A pipeline with another denoiser."""

    def __init__(self, pipe: Any, module: nn.Module) -> None:
        self._pipe = pipe
        setattr(self, denoiser_name(pipe), module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


class _FusedAttention(TorchFunctionMode):
    """Replaces attention, which on the meta device would save the full score matrix, unlike fused kernels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        options = kwargs or {}
        if func is F.scaled_dot_product_attention:
            inputs = (*args[:3], *(options[name] for name in ("query", "key", "value") if name in options))
            return _Attention.apply(*inputs)  # type: ignore[no-untyped-call]
        return func(*args, **options)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        return out


def available(device: torch.device) -> int:
    """Free memory of ``device`` in bytes, including PyTorch's unused reserved memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil  # type: ignore[import-untyped, unused-ignore]

    return int(psutil.virtual_memory().available)


def capacity(device: torch.device) -> int:
    """All memory of ``device`` in bytes; for a CPU with its swap space."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    import psutil  # type: ignore[import-untyped, unused-ignore]

    return int(psutil.virtual_memory().total + psutil.swap_memory().total)
