"""A LoRA file of another tool as an adapter of this toolkit, in memory: its own factors, so the same update."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters import AdapterConfig, lora
from ..errors import UserError
from ..formats.adapter_info import AdapterInfo
from ..formats.foreign import bundled_tokens
from ..formats.foreign_updates import Scales, fitted_modules
from ..formats.keys import Projection, file_key
from ..io.tensor_file import TensorFile
from ..io.tensors import Tensors
from ..pipelines.components import canonical, components

Pair = tuple[Tensor, Tensor]
"""``(A [r, d_in], B [d_out, r])``; the scale is in ``B``."""


def as_adapter(pipe: Any, info: AdapterInfo) -> tuple[AdapterInfo, Tensors]:
    """The description and the tensors of a LoRA file, as those of an adapter of the method ``lora``.

    ``dW = alpha / r * up down`` is ``B A`` with ``A = down`` and ``B = alpha / r * up``: exact but for one rounding.
    Raises :class:`UserError` for a file of another base, and for one that is not a plain LoRA.
    """
    if info.kind == "textual inversion":
        raise _refusal(info, "it is no LoRA")
    pairs: dict[Projection, Pair] = {}
    kernels: dict[str, list[int]] = {}
    with TensorFile(Path(info.path)) as reader:
        if bundled_tokens(reader):
            raise _refusal(info, "it brings new tokens")
        scales = Scales(reader)
        for (component, name), (module, factors) in fitted_modules(components(pipe), reader).items():
            if not factors.keys() <= {"down", "up", "alpha"}:
                raise _refusal(info, "it is not a plain LoRA")
            path, down, up = canonical(name), factors["down"].float(), factors["up"].float()
            if len(down) > min(down[0].numel(), len(up)):
                raise _refusal(info, f"a rank of {len(down)} is larger than the weight")
            if down.dim() == 4:
                kernels[f"{component}.{path}"] = list(down.shape[1:])
            pairs[component, path] = down.flatten(1), scales.of(module, factors) * up.flatten(1)
    configs = {component: _config(pairs, component) for component, _ in pairs}
    tensors = {
        file_key(*projection, factor): value
        for projection, pair in pairs.items()
        for factor, value in zip("AB", pair, strict=True)
    }
    described = AdapterInfo(
        {component: config.to_dict() for component, config in configs.items()},
        conv_shapes=kernels,
        trigger=info.trigger,
        path=info.path,
        sha256=info.sha256,
        bytes=info.bytes,
    )
    return described, tensors


def _config(pairs: dict[Projection, Pair], component: str) -> AdapterConfig:
    ranks = {path: len(down) for (owner, path), (down, _) in pairs.items() if owner == component}
    (usual, _), *_ = Counter(ranks.values()).most_common(1)
    others = {path: rank for path, rank in ranks.items() if rank != usual}
    return lora(r=usual, target_modules=sorted(ranks), rank_pattern=others)


def _refusal(info: AdapterInfo, reason: str) -> UserError:
    return UserError(
        f"{info.path} is {info.note}, which cannot be served ({reason}): convert it with `nora-diffusion import`, or "
        "use it with load_adapter"
    )
