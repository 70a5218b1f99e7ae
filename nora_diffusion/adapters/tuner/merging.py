"""What is merged into one weight, remembered so that it can be taken out again bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Merged:
    """``clean``: the weight before merging; ``scalings``: of the adapters merged since; ``mark``: of the weight after.

    ``clean`` lies on the CPU: a copy of every adapted weight is too much for an accelerator that just fits the model.
    Scalings are kept, because a user may change them while the adapters are fused.
    """

    clean: Tensor
    scalings: dict[str, float]
    mark: int

    def intact(self, weight: Tensor) -> bool:
        """Whether nobody (a LoRA that was fused on top, a cast) has changed the weight since."""
        return weight.dtype == self.clean.dtype and bit_sum(weight) == self.mark


def bit_sum(weight: Tensor) -> int:
    """The sum of a tensor's bits read as 64-bit words: quick, exact, the same on every device, for any dtype.

    0 on the meta device, whose tensors have no numbers.
    """
    if weight.is_meta:
        return 0
    raw = weight.detach().contiguous().flatten().view(torch.uint8)
    if raw.storage_offset() % 8:
        raw = raw.clone()  # words must begin at a word
    whole = raw.numel() // 8 * 8
    return int(raw[:whole].view(torch.int64).sum()) + int(raw[whole:].sum())
