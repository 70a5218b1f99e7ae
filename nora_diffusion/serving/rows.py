"""The subjects of each row of a pass, which change between the passes of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.tuner.mixed_rows import LayerRows, serve_rows
from ..adapters.tuner.row_plan import RowPlan, RowSpec, live
from ..pipelines.components import components, named_tuner_layers
from ..pipelines.names import DENOISERS


@dataclass(frozen=True)
class Spec:
    """The adapters of a picture by their names in the pipeline, with weights: ``(name, denoiser's, encoders')``."""

    adapters: tuple[tuple[str, float, float], ...] = ()

    def weights(self, component: str) -> dict[str, float]:
        """The weights in one component."""
        position = 1 if component in DENOISERS else 2
        return {adapter[0]: float(adapter[position]) for adapter in self.adapters}


class AssignedPlan(RowPlan):
    """A plan whose specs and batch the engine assigns before each pass; ``names``: adapters that specs may have."""

    keeps_pairs = True

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__([dict.fromkeys(names, 1.0)])
        self._block = 1

    def begin(self, first: Tensor) -> None:
        """Nothing is left to do."""

    def serve(self, specs: Sequence[RowSpec]) -> None:
        """Take other specs, which the next batch is made of."""
        self.specs, self.batch = [live(spec) for spec in specs], []

    def assign_blocks(self, blocks: Sequence[tuple[int, int]]) -> None:
        """Set the spec index and the number of rows of each block of the next batch.

        Blocks of equal size stay apart, even if two have the same spec: their factors need not be copied for each row.
        """
        size = blocks[0][1] if len({rows for _, rows in blocks}) == 1 else 1
        if size != self._block:
            self.batch = []
        before, self._block = self.changes, size
        self.assign([spec for spec, rows in blocks for _ in range(rows)])
        if self.changes != before:
            self.used, self.in_blocks = [self.specs[spec] for spec in self.batch[::size]], True

    def index(self, device: torch.device) -> Tensor:
        """The block of each row, ``[n]``."""
        return self._tensor(("index",), [row // self._block for row in range(len(self.batch))], device)


class Rows:
    """Applies to each row of a pass the adapters of its picture.

    The layers are prepared for a set of adapters, and once more when another one comes. Which of them a spec has, at
    which weights, may change in each pass.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._names: dict[str, None] = {}
        self._specs: list[Spec] = []
        self._plans: dict[str, AssignedPlan] = {}
        self._stack = ExitStack()

    def prepare(self, specs: Sequence[Spec]) -> None:
        """Make sure that all these specs, of the pictures at work, can be assigned."""
        names = dict.fromkeys(adapter[0] for spec in specs for adapter in spec.adapters)
        if not self._plans or not names.keys() <= self._names.keys():
            self._open({**self._names, **names})
        if set(specs) != set(self._specs):
            self._specs = list(dict.fromkeys(specs))
            for component, plan in self._plans.items():
                plan.serve([spec.weights(component) for spec in self._specs])

    def _open(self, names: dict[str, None]) -> None:
        self.close()
        self._names = names
        for component, module in components(self._pipe).items():
            plan = AssignedPlan(list(names))
            self._stack.enter_context(serve_rows(module, plan, named_tuner_layers(module)))
            self._plans[component] = plan

    def assign(self, component: str, blocks: Sequence[tuple[Spec, int]]) -> None:
        """The spec of each picture in the next pass of a component, with the number of its rows."""
        self._plans[component].assign_blocks([(self._specs.index(spec), rows) for spec, rows in blocks])

    def forget(self) -> None:
        """Keep nothing that was computed of the factors of subjects, which are to leave memory."""
        for component in self._plans:
            for _, layer in named_tuner_layers(components(self._pipe)[component]):
                if isinstance(rows := getattr(layer, "rows", None), LayerRows):
                    rows.forget()

    def close(self) -> None:
        """Leave the layers as they were, so that adapters can be loaded and deleted."""
        self._stack.close()
        self._plans, self._names, self._specs = {}, {}, []
