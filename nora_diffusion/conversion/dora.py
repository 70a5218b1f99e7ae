"""A DoRA as a plain LoRA: its update of the base's weight, truncated by SVD."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import UserError
from ..formats.adapter_info import AdapterInfo
from ..formats.keys import Projection
from ..loaders import check_adapter
from ..pipelines.base import open_pipeline
from ..pipelines.components import canonical, components, projections, refuse_merged, refuse_offloaded

TOLERANCE = 0.01
"""Largest ``||dW_file - dW|| / ||dW||`` of a projection, if no rank is given."""
LARGEST_RANK = 128
"""Largest rank that is chosen to keep :data:`TOLERANCE`."""


def base_weights(pipe: Any, info: AdapterInfo, basis_dir: str | Path | None) -> dict[Projection, Tensor]:
    """The weights ``[d_out, d_in]`` of the adapter's projections in its base, opened by its name if ``pipe`` is None.

    Raises :class:`UserError` if the base cannot be opened, is another one, is quantized, or has a fused adapter.
    """
    if pipe is None:
        try:
            pipe = open_pipeline(info.base)
        except UserError as error:
            raise UserError(
                f"a plain LoRA of the DoRA {info.path} needs the weights of its base: give the base, or export the "
                f"magnitude ({error})"
            ) from error
    modules = components(pipe)
    refuse_merged(modules)
    refuse_offloaded(modules)
    check_adapter(pipe, info.path, basis_dir)
    found: dict[Projection, Tensor] = {}
    for component, stored in info.base_fingerprint.items():
        layers = {canonical(path): layer for path, layer in projections(modules[component]).items()}
        for path in stored:
            if hasattr(layers[path], "true_fingerprint"):
                raise UserError(f"the {component} is quantized: open the base without quantization to export a DoRA")
            found[component, path] = cast(Tensor, layers[path].weight).detach().flatten(1)
    return found


def truncated(
    weight: Tensor, down: Tensor, up: Tensor, magnitude: Tensor, rank: int | None
) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
    """The pair ``(A [k, d_in], B [d_out, k])`` nearest to ``dW = m / ||W + B A|| (W + B A) - W`` in the Frobenius norm.

    ``down``, ``up``: the adapter's pair with its scale. ``rank=None``: the smallest ``k`` up to :data:`LARGEST_RANK`
    within :data:`TOLERANCE`. The third value computes ``dW`` again, so that the updates of a whole model need not be in
    memory at once.
    """

    def update() -> Tensor:
        base = weight.to(torch.float64).cpu()
        adapted = base + up @ down
        return cast(Tensor, (magnitude / adapted.norm(dim=1))[:, None] * adapted - base)

    u, s, vt = torch.linalg.svd(update(), full_matrices=False)
    if rank is None:
        rest = s.square().flip(0).cumsum(0).flip(0).sqrt()  # the error of cutting before each singular value
        rank = min(int((rest > TOLERANCE * s.norm()).sum()), LARGEST_RANK)
    root = s[: max(rank, 1)].sqrt()
    return root[:, None] * vt[: len(root)], u[:, : len(root)] * root, update
