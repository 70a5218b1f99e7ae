"""Which adapters each row of a batch uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError

RowSpec = Mapping[str, float]
"""The adapters of one row with their weights; empty for the base alone."""


def live(spec: RowSpec) -> RowSpec:
    """A spec without the adapters of weight 0."""
    return {name: weight for name, weight in spec.items() if weight}


class RowPlan:
    """Which adapters each row of a model's batch uses.

    A batch of ``n = g len(specs) repeats`` rows is ``g`` copies (guidance: negative, positive) of the specs in order,
    each repeated ``repeats`` times in succession (``num_images_per_prompt``). ``batch`` has the spec index of each row.
    ``exact``: refuse copies. ``keeps_pairs``: whether the specs of a batch come again in other batches, so that what
    is computed for one of them is kept.
    """

    keeps_pairs = False

    def __init__(self, specs: Sequence[RowSpec], *, exact: bool = False) -> None:
        self.exact = exact
        self.specs = [live(spec) for spec in specs]
        self.names = list(dict.fromkeys(name for spec in self.specs for name in spec))
        self.repeats = 1
        self.batch: list[int] = []
        self.used: list[RowSpec] = []
        """The specs of the batch, each once, in order."""
        self.in_blocks = False
        """Whether the batch has the rows of each of these specs together, in their order, and equally many of each."""
        self.live: set[str] = set()
        """The adapters of the batch."""
        self.changes = 0
        """How often the batch has changed."""
        self.passes = 0
        """How many calls have started."""
        self._tensors: dict[Any, Tensor] = {}

    def read_prompts(self, prompts: str | list[str] | None) -> None:
        """Called with the prompts of a pipeline call; ``None`` if the caller has encoded them."""

    def begin(self, first: Tensor) -> None:
        """:meth:`start` a call of the model whose first tensor (latents, states or token ids) is ``first [n, ...]``."""
        self.start(len(first))

    def start(self, rows: int) -> None:
        """Assign specs for a call with this many rows. Raises :class:`UserError` for a number that does not fit."""
        block = len(self.specs) * self.repeats
        if self.exact and rows != block:
            raise UserError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {block} and {rows} "
                "respectively."
            )
        if rows % block:
            times = f" (times {self.repeats} images per prompt)" if self.repeats > 1 else ""
            raise UserError(
                f"a batch of {rows} rows is not a multiple of the {len(self.specs)} rows of mixed_batch{times}: give "
                "one prompt for each row"
            )
        self.assign([(row % block) // self.repeats for row in range(rows)])

    def assign(self, batch: list[int]) -> None:
        """Set the spec index of each row of the batch of the next pass."""
        self.passes += 1
        if batch == self.batch:
            return
        self.batch, self._tensors = batch, {}
        used = sorted(set(batch))
        self.used = [self.specs[index] for index in used]
        self.in_blocks = batch == [index for index in used for _ in range(len(batch) // len(used))]
        self.live = {name for spec in self.used for name in spec}
        self.changes += 1

    def check_prompts(self, prompts: int) -> None:
        """Raise :class:`UserError` unless there is one prompt for each row; a single row fits any number.

        :meth:`start` cannot tell: twice as many prompts look like guidance.
        """
        if len(self.specs) not in (1, prompts):
            raise UserError(
                f"{prompts} prompts but {len(self.specs)} rows of mixed_batch: give one prompt for each row"
            )

    def index(self, device: torch.device) -> Tensor:
        """The position in :attr:`used` of each row's spec, ``[n]``."""
        position = {index: i for i, index in enumerate(sorted(set(self.batch)))}
        return self._tensor(("index",), [position[index] for index in self.batch], device)

    def share(self, name: str, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """``(rows [m], weights [m])``: indices and weights of the rows that use an adapter; ``None`` if none does."""
        rows = [row for row, spec in enumerate(self.batch) if name in self.specs[spec]]
        if not rows:
            return None
        weights = [self.specs[self.batch[row]][name] for row in rows]
        return self._tensor(("rows", name), rows, device), self._tensor(("weights", name), weights, device)

    def _tensor(self, key: tuple[str, ...], values: Sequence[float], device: torch.device) -> Tensor:
        if (key, device) not in self._tensors:
            # Without waiting for the work that a GPU still has to do.
            self._tensors[key, device] = torch.tensor(values).to(device, non_blocking=True)
        return self._tensors[key, device]


class MaskedPlan(RowPlan):
    """A plan whose adapters act at some positions of a layer only, at the weights that they have in their layers.

    All rows have the same adapters, so that it fits any number of prompts.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__([dict.fromkeys(names, 1.0)])

    def check_prompts(self, prompts: int) -> None:
        """Any number fits."""

    def mask(self, path: str, name: str, positions: Sequence[int]) -> Tensor | None:
        """The factor of an adapter at each position of the layer at ``path``: ``[n, *positions, 1]``, or broadcastable.

        ``positions``: the shape between rows and channels: ``[T]`` for tokens, ``[h, w]`` in a convolution. ``None``:
        1 everywhere.
        """
        raise NotImplementedError
