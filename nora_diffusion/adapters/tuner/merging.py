"""Merging adapters into the weight of one projection, and taking them out again bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...errors import UserError

Change = Callable[[str, float], Tensor]
"""``(adapter, scaling) -> scaling * dW`` in fp32, in the shape of the weight."""


class WeightMerge:
    """The adapters merged into one weight.

    ``clean``: the weight before merging, ``None`` while nothing is merged. It is on the CPU: a copy of every adapted
    weight is too much for an accelerator that just fits the model. ``scalings``: scaling of each merged adapter at the
    time of merging, since a user may change it while the adapter is merged.
    """

    def __init__(self) -> None:
        self.clean: Tensor | None = None
        self.scalings: dict[str, float] = {}
        self._merged_bits = 0
        self._frozen_bits: int | None = None

    def frozen(self, weight: Tensor) -> Tensor:
        """The weight without the merged adapters, on the device and in the dtype of ``weight``."""
        return weight.detach() if self.clean is None else self.clean.to(weight)

    def pin(self, weight: Tensor) -> None:
        """Record the frozen weight that an adapter with a magnitude rescales, so that :meth:`merge` detects changes."""
        if self.clean is None:
            self._frozen_bits = bit_sum(weight)

    def repin(self, weight: Tensor) -> None:
        """Update the record of :meth:`pin` after the module was moved or cast."""
        if self._frozen_bits is not None:
            self._frozen_bits = bit_sum(weight) if self.clean is None else None

    def merge(
        self, weight: Tensor, scalings: Mapping[str, float], change: Change, *, rescales: bool, safe: bool = False
    ) -> None:
        """Add adapters to ``weight`` in place. ``rescales``: the layer has an adapter with a magnitude.

        Raises :class:`UserError` if the weight is offloaded or no longer the one that a magnitude was made for, and
        ``ValueError`` if ``safe`` and the result is not finite; the weight is then unchanged.
        """
        if weight.is_meta:
            raise UserError("the weights are offloaded layer by layer: call pipe.remove_all_hooks() before fusing")
        if rescales and self.clean is None and self._frozen_bits not in (None, bit_sum(weight)):
            raise UserError(
                "an adapter with a magnitude (DoRA) was made for another weight: a LoRA was fused into the same "
                "projection first, or the weight was changed; call unfuse_lora(), then delete one of the two"
            )
        total = {**self.scalings, **scalings}
        if self.clean is not None and self._is_intact(weight):
            # Sum all of them from the clean weight: rounding twice could not be undone.
            merged = with_deltas(self.clean.to(weight.device), total, change)
        else:
            merged = with_deltas(weight.detach(), scalings, change)
        if safe and not torch.isfinite(merged).all():
            raise ValueError(f"merging {', '.join(scalings)} gives weights that are not finite: the adapter is broken")
        if self.clean is None:
            self.clean = weight.detach().to("cpu", copy=True)
        weight.data.copy_(merged)
        self.scalings, self._merged_bits = total, bit_sum(weight)

    def unmerge(self, weight: Tensor, change: Change) -> None:
        """Take all adapters out of ``weight``: bit for bit, unless another tool has changed it since the merge."""
        if self.clean is None:
            return
        if self._is_intact(weight):
            weight.data.copy_(self.clean)
        else:
            weight.data.copy_(with_deltas(weight.detach(), self.scalings, change, sign=-1.0))
            self._frozen_bits = None  # the other tool leaves rounding errors behind
        self.clean, self.scalings = None, {}

    def _is_intact(self, weight: Tensor) -> bool:
        """Whether the weight is as :meth:`merge` left it; not after a cast, or after a LoRA was fused on top."""
        assert self.clean is not None
        return weight.dtype == self.clean.dtype and bit_sum(weight) == self._merged_bits


def with_deltas(weight: Tensor, scalings: Mapping[str, float], change: Change, sign: float = 1.0) -> Tensor:
    """``W + sign * sum_k scaling_k dW_k``, summed in fp32, in the dtype of ``weight``."""
    if not scalings:
        return weight
    total = torch.stack([change(name, scaling) for name, scaling in scalings.items()]).sum(0)
    return (weight.float() + sign * total).to(weight.dtype)


def bit_sum(weight: Tensor) -> int:
    """Checksum: the sum of a tensor's bytes read as 64-bit words. Fast, exact and the same on every device.

    0 on the meta device, whose tensors have no data.
    """
    if weight.is_meta:
        return 0
    raw = weight.detach().contiguous().flatten().view(torch.uint8)
    if raw.storage_offset() % 8:
        raw = raw.clone()  # a view as int64 must be aligned
    whole = raw.numel() // 8 * 8
    return int(raw[:whole].view(torch.int64).sum()) + int(raw[whole:].sum())
