"""Load offloaded factors while a layer reads them.

``enable_sequential_cpu_offload`` (accelerate) and ``enable_group_offload`` (diffusers) load the tensors of a module to
its device when that module is called. A layer reads the factors of its deltas without calling them, so it has to run
their hooks itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate or diffusers loads the tensors of this module when it is called."""
    return hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")


@contextmanager
def onloaded(*modules: nn.Module) -> Iterator[None]:
    """Load the tensors of ``modules`` and of all their submodules inside the context."""
    hooks = [(module, hook) for top in modules for module in top.modules() for hook in _hooks(module)]
    try:
        for module, hook in hooks:
            hook.pre_forward(module)
        yield
    finally:
        for module, hook in reversed(hooks):
            hook.post_forward(module, None)


def _hooks(module: nn.Module) -> Iterator[Any]:
    if hasattr(module, "_hf_hook"):
        yield module._hf_hook
    if hasattr(module, "_diffusers_hook"):
        hook = module._diffusers_hook.get_hook("group_offloading")  # type: ignore[operator, union-attr]
        if hook is not None:
            yield hook
