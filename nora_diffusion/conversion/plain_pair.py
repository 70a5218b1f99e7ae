"""The plain LoRA of one projection, its measured error, and what readers of kohya's files need of all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..io.tensors import Tensors

OPEN_CLIP = {"sdxl": "text_encoder_2", "sd2": "text_encoder"}
"""The text encoder that AUTOMATIC1111 runs in open_clip's code, by architecture: CLIP-G and CLIP-H."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass
class PlainPair:
    """One projection's LoRA: ``dW = (alpha / r) B A``.

    ``kernel``: ``[c, kh, kw]`` of a convolution. ``magnitude``: DoRA's ``m``. ``alpha``: ``None`` means the rank, so
    that every reader scales by 1. ``exact``: computes the update that the pair approximates, if it is not equal to it.
    """

    component: str
    path: str
    down: Tensor
    up: Tensor
    kernel: list[int] | None
    magnitude: Tensor | None = None
    alpha: int | None = None
    exact: Callable[[], Tensor] | None = None

    @property
    def rank(self) -> int:
        """The rank ``r``."""
        return self.down.shape[0]

    @property
    def is_t5(self) -> bool:
        """Whether the projection is one of a T5."""
        return self.component.startswith("text_encoder") and self.path.startswith("encoder.block.")

    def shaped(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The factors as stored in files: 2-D for linear layers, 4-D for convolutions."""
        down, up = self.down.to(dtype), self.up.to(dtype)
        if self.kernel is None:
            return down.contiguous(), up.contiguous()
        return down.view(-1, *self.kernel).contiguous(), up[:, :, None, None].contiguous()

    def peft_tensors(self, key: str, dtype: torch.dtype) -> Tensors:
        """PEFT's names: ``lora_A``, ``lora_B`` and the magnitude, ``[d_out]`` or ``[1, d_out, 1, 1]``."""
        down, up = self.shaped(dtype)
        tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        if self.magnitude is not None:
            m = self.magnitude.to(dtype)
            tensors[f"{key}.lora_magnitude_vector.weight"] = m if self.kernel is None else m.view(1, -1, 1, 1)
        return tensors

    def comfy_tensors(self, dtype: torch.dtype) -> Tensors:
        """The names of diffusers' attention processors, ``attn1.processor.to_q_lora.down.weight``, for a UNet.

        ComfyUI reads only these, diffusers also the names of :meth:`peft_tensors`. Other layers are ``.lora.down``.
        """
        down, up = self.shaped(dtype)
        key = f"{self.component}.{self.path}.lora"
        if match := re.fullmatch(r"(.*)\.(to_[qkv]|to_out)(\.0)?", self.path):
            key = f"{self.component}.{match[1]}.processor.{match[2]}_lora"
        return {f"{key}.down.weight": down, f"{key}.up.weight": up}

    def kohya_tensors(self, key: str, dtype: torch.dtype) -> Tensors:
        """kohya's names: ``lora_down``, ``lora_up``, ``alpha``, and ``dora_scale [d_out, 1]`` (4-D for conv)."""
        down, up = self.shaped(dtype)
        tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(float(self.alpha or self.rank))  # fp32: bf16 cannot represent 257
        if self.magnitude is not None:
            tensors[f"{key}.dora_scale"] = self.magnitude.to(dtype).view(-1, *(1 for _ in down.shape[1:]))
        return tensors

    def error(self, dtype: torch.dtype) -> PairError:
        """The error of the pair as stored in ``dtype``, in fp64."""
        scale = (self.alpha or self.rank) / self.rank
        exact = self.exact() if self.exact else scale * (self.up @ self.down)
        difference = scale * (self.up.to(dtype).double() @ self.down.to(dtype).double()) - exact
        return PairError(
            float(difference.abs().max()), float(exact.abs().max()), float(difference.square().sum()),
            float(exact.square().sum()),
        )  # fmt: skip


class PairError(NamedTuple):
    """``max |dW_file - dW|``, ``max |dW|``, ``||dW_file - dW||_F^2`` and ``||dW||_F^2``."""

    worst: float
    largest: float
    lost: float
    energy: float


def with_common_alpha(pairs: Sequence[PlainPair]) -> list[PlainPair]:
    """The same updates with the largest rank as every alpha: diffusers misreads kohya files with different alphas."""
    alpha = max(pair.rank for pair in pairs)
    return [replace(pair, up=pair.up * (pair.rank / alpha), alpha=alpha) for pair in pairs]


def with_whole_attention(pairs: Sequence[PlainPair], component: str | None) -> list[PlainPair]:
    """``pairs``, and zeros for the projections that an attention of ``component`` does not adapt.

    AUTOMATIC1111 ignores an attention of open_clip unless the file has all four projections. A magnitude applies to
    the projections that have one, so nothing is added beside one.
    """
    added: dict[str, PlainPair] = {}
    for pair in pairs:
        match = re.fullmatch(rf"(.*\.self_attn)\.({'|'.join(ATTENTION)})", pair.path)
        if match and pair.component == component and pair.magnitude is None:
            for path in (f"{match[1]}.{name}" for name in ATTENTION):
                down, up = torch.zeros_like(pair.down), torch.zeros_like(pair.up)
                added[path] = replace(pair, path=path, down=down, up=up, exact=None)
    present = {pair.path for pair in pairs if pair.component == component}
    return [*pairs, *(pair for path, pair in added.items() if path not in present)]
