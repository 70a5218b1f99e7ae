"""Disk cache of latents and text embeddings. An entry's name is a hash of all its inputs, so it is never stale."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...io import tensor_cache
from ...io.tensors import named_hash
from ...versions import versions

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]


class EncodingCache:
    """Loads encodings from disk or computes and saves them; with ``disk=False`` it always computes them."""

    def __init__(self, disk: bool = False) -> None:
        self.disk = disk
        if disk and tensor_cache.folder() is None:
            log.warning("--cache_latents disk has no effect: NORA_CACHE=off turns the cache off")

    def __call__(self, kind: str, inputs: Callable[[], Mapping[str, Any]], encode: Callable[[], Tensors]) -> Tensors:
        """The result of ``encode``, from disk if one for the same ``inputs`` is cached."""
        if not self.disk:
            return encode()
        name = cache_key(kind, inputs())
        found = tensor_cache.load(name)
        if found is None:
            found = {key: value.detach().cpu() for key, value in encode().items()}
            tensor_cache.store(name, found)
        return found


def cache_key(kind: str, inputs: Mapping[str, Any]) -> str:
    """Name of an entry: hash of its inputs, the library versions and the TF32 modes."""
    content = {
        "kind": kind,
        "versions": versions(),
        "tf32": [_tf32(torch.backends.cuda.matmul), _tf32(torch.backends.cudnn)],
        **inputs,
    }
    return f"{kind}-{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}"


def _tf32(backend: Any) -> Any:
    """TF32 mode; prefers ``fp32_precision``, since reading ``allow_tf32`` may raise."""
    return backend.fp32_precision if hasattr(backend, "fp32_precision") else backend.allow_tf32


def module_hash(module: nn.Module) -> str:
    """SHA-256 of a module's class, config and weights (names, dtypes and bytes)."""
    settings: Any = getattr(module, "config", {})
    settings = settings.to_dict() if hasattr(settings, "to_dict") else dict(settings)
    config = {name: repr(value) for name, value in settings.items() if name not in ("_name_or_path", "name_or_path")}
    parts = [type(module).__name__, json.dumps(config, sort_keys=True), named_hash(dict(module.state_dict()))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def dtype_and_device(module: Any) -> list[str]:
    """Dtype and device type of a module, as strings."""
    return [str(module.dtype), module.device.type]
