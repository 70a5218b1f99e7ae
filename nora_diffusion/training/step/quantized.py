"""The frozen denoiser in 8 bits, by torchao: less memory for the base, the adapter as before.

Only with gradient checkpointing: the widened weights are what autograd keeps of frozen layers for the backward pass, of
one block then, of all without it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ...pipelines.components import fingerprint, projections
from ..settings.config import TrainConfig
from .denoiser import denoiser


def quantize_base(config: TrainConfig, pipe: Any) -> None:
    """Round the frozen linear layers of the denoiser to ``round(127 W / max_row |W|)`` where the config asks for it.

    After the adapters are in: their bases were computed from the true weights, and their factors stay as they are.
    Layers keep the fingerprints of their true weights, for the file. Weights are widened again for each product,
    so that activations and gradients have the precision that they had.
    """
    if config.quantize_base is None:
        return
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for path, layer in projections(denoiser(pipe)).items():
        noted: Any = fingerprint(layer, path)
        layer.true_fingerprint = noted
    quantize_(denoiser(pipe), Int8WeightOnlyConfig(), filter_fn=_is_frozen_linear)


def _is_frozen_linear(module: nn.Module, path: str) -> bool:
    return isinstance(module, nn.Linear) and ".nora_" not in path and not module.weight.requires_grad
