"""The first gradient of the dense core between frozen outer factors, whose singular values score further ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters import NoraLayer
from ...adapters.deltas.chain import ChainDelta
from ...adapters.deltas.cores import DenseCore
from ...errors import UserError
from ...pipelines.components import Modules, nora_layers, without_adapters

Layer = tuple[str, str]
"""The component and path of an adapted layer."""


def core_gradients(modules: Modules, adapter: str, losses: Iterable[Tensor], scale: float = 1.0) -> dict[Layer, Tensor]:
    """The summed gradient of the ``losses``, drawn one by one, for each layer of an adapter that has not been trained.

    Of an adapter with both outer factors frozen it is ``G = s B_out^T (dL/dW) A_out^T [r, r]``, of a one-sided one
    ``G = s (dL/dW) A_out^T [d_out, r]``: the gradient of a dense core, or of an up factor, that starts at zero.
    ``dL/dW`` itself is never formed. All adapters are off meanwhile. ``scale``: of the losses, against underflow.
    Raises :class:`UserError` for a gradient that is not finite.
    """
    with ExitStack() as stack:
        probes: dict[Layer, nn.Parameter] = {}
        for name, module in modules.items():
            for path, layer in nora_layers(module, adapter).items():
                probes[name, path] = stack.enter_context(_probe(layer, adapter))
        stack.enter_context(without_adapters(modules))
        for loss in losses:
            torch.autograd.backward(scale * loss, inputs=list(probes.values()))
    found = {
        key: torch.zeros_like(probe) if probe.grad is None else probe.grad / scale for key, probe in probes.items()
    }
    if not all(gradient.isfinite().all() for gradient in found.values()):
        raise UserError("the gradients for --rank_allocation are not finite: use --mixed_precision bf16 or no")
    return found


@contextmanager
def _probe(layer: NoraLayer, adapter: str) -> Iterator[nn.Parameter]:
    """A zero parameter whose gradient is ``G``, behind the layer's ``A_out`` while the context is open."""
    delta: Any = layer.delta(adapter)
    down, up = delta.stored_outer
    if delta.frozen_sides == 2:
        core = DenseCore(len(down)).to(down.device)
        chain = ChainDelta(down, up, core, trained=["core"], blocks=delta.blocks)
    else:
        chain = ChainDelta(down, torch.zeros(len(up), len(down), device=down.device), trained=["up"])
    (probe,) = chain.parameters()
    factor = layer.states[adapter].native_scale

    def add(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        return y + factor * layer.channels_first(chain(args[0], layer.contract)).to(y.dtype)

    handle = layer.register_forward_hook(add)
    try:
        yield probe
    finally:
        handle.remove()
