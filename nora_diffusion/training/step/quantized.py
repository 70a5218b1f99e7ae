"""Int8 quantization of the frozen denoiser with torchao, which saves memory; the adapter is not quantized.

Requires gradient checkpointing: autograd saves the dequantized weights for the backward pass, with checkpointing those
of one block, without it those of all layers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ...pipelines.components import denoiser, projections
from ...pipelines.fingerprints import fingerprint
from ..settings.config import TrainConfig


def quantize_base(config: TrainConfig, pipe: Any) -> None:
    """Quantize the frozen linear layers of the denoiser to ``round(127 W / max_row |W|)`` if the config asks for it.

    Call it after adding the adapters, whose bases are computed from the original weights. Layers keep the fingerprints
    of these weights for the adapter file. Weights are dequantized for each product, so activations and gradients keep
    their precision.
    """
    if config.quantize_base is None:
        return
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for path, layer in projections(denoiser(pipe)).items():
        original: Any = fingerprint(layer, path)
        layer.true_fingerprint = original
    quantize_(denoiser(pipe), Int8WeightOnlyConfig(), filter_fn=_is_frozen_linear)


def _is_frozen_linear(module: nn.Module, path: str) -> bool:
    return isinstance(module, nn.Linear) and ".nora_" not in path and not module.weight.requires_grad
