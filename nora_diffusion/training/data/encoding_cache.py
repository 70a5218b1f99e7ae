"""Encodings that later runs find on disk, named by a hash of all that they depend on: never stale, at worst absent."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...io import tensor_cache
from ...io.tensor_file import named_hash
from ...versions import versions

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]


class EncodingCache:
    """Looks encodings up before they are made, or makes them each time (``disk=False``)."""

    def __init__(self, disk: bool = False) -> None:
        self.disk = disk
        if disk and tensor_cache.folder() is None:
            log.warning("--cache_latents disk: NORA_CACHE=off says that nothing is kept")

    def __call__(self, kind: str, ingredients: Callable[[], Mapping[str, Any]], make: Callable[[], Tensors]) -> Tensors:
        """What ``make`` gives, from the disk if it was made of the same ``ingredients`` before."""
        if not self.disk:
            return make()
        name = key(kind, ingredients())
        found = tensor_cache.load(name)
        if found is None:
            found = {part: value.detach().cpu() for part, value in make().items()}
            tensor_cache.store(name, found)
        return found


def key(kind: str, ingredients: Mapping[str, Any]) -> str:
    """The name of an entry: what it is made of, and what made it."""
    whole = {
        "kind": kind,
        "versions": versions(),
        "tf32": [_tf32(torch.backends.cuda.matmul), _tf32(torch.backends.cudnn)],
        **ingredients,
    }
    return f"{kind}-{hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()}"


def _tf32(backend: Any) -> Any:
    """How a backend rounds fp32: by its newer name where there is one, for the older then may raise when it is read."""
    return backend.fp32_precision if hasattr(backend, "fp32_precision") else backend.allow_tf32


def module_hash(module: nn.Module) -> str:
    """SHA-256 of a module: its class, its settings, and the names, types and bytes of its weights."""
    settings: Any = getattr(module, "config", {})
    settings = settings.to_dict() if hasattr(settings, "to_dict") else dict(settings)
    shown = {name: repr(value) for name, value in settings.items() if name not in ("_name_or_path", "name_or_path")}
    parts = [type(module).__name__, json.dumps(shown, sort_keys=True), named_hash(dict(module.state_dict()))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def place(module: Any) -> list[str]:
    """Where and in which precision a module computes."""
    return [str(module.dtype), module.device.type]
