"""What is merged into one weight, remembered so that it can be taken out again bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Merged:
    """``clean``: the weight before merging; ``scalings``: of the adapters merged since; ``mark``: of the weight after.

    Scalings are kept, because a user may change them while the adapters are fused.
    """

    clean: Tensor
    scalings: dict[str, float]
    mark: int

    def intact(self, weight: Tensor) -> bool:
        """Whether nobody (a LoRA that was fused on top, a cast) has changed the weight since."""
        return weight.dtype == self.clean.dtype and bit_sum(weight) == self.mark


def bit_sum(weight: Tensor) -> int:
    """The sum of the numbers' bit patterns: exact and the same on every device, different after any real change.

    0 on the meta device, whose tensors have no numbers.
    """
    if weight.is_meta:
        return 0
    return int(weight.detach().view(_INTEGERS[weight.element_size()]).sum(dtype=torch.int64))
