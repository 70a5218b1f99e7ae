"""The hook that runs any rank allocation."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ...formats.adapter_writing import Contents
from ...formats.compacting import compacted, rank_of
from ..hooks.step_hook import State, StepHook
from ..hooks.trained import Trained
from .penalties import mean_penalty
from .ranks import Ranks
from .table import Allocation

log = logging.getLogger(__name__)


class AllocationHook(StepHook):
    """Runs an :class:`.table.Allocation`; the saved adapter has each layer at the rank that it ended with."""

    name = "ranks"

    def __init__(self, trained: Trained, allocation: Allocation) -> None:
        self.ranks, self.allocation = Ranks(trained), allocation
        self.decisions = allocation.schedule(self.ranks.steps)
        self.needs_own_pass = allocation.measure.around is not None  # type: ignore[misc]

    @property
    def decided(self) -> int:
        """Decisions so far."""
        return int(self.ranks.memory.get("decided", torch.zeros(())))

    @property
    def is_settled(self) -> bool:
        """Whether all decisions were made."""
        return self.decided == len(self.decisions)

    @torch.no_grad()
    def start(self) -> None:
        self.ranks.memory["decided"] = torch.zeros((), dtype=torch.int64)
        if self.allocation.begin is not None:
            self.allocation.begin(self.ranks)

    @contextmanager
    def around_pass(self, step: int) -> Iterator[None]:
        around = self.allocation.measure.around
        if around is None or self.is_settled:
            yield
        else:
            with around(self.ranks):
                yield

    def penalty(self, step: int) -> Tensor | None:
        if self.allocation.penalty is None or (self.allocation.shrinking and self.is_settled):
            return None
        weight, penalty = self.allocation.penalty
        return weight * mean_penalty(penalty, [[(c.down, c.up) for c in group] for group in self.ranks.groups])

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        if not self.is_settled:
            self.allocation.measure.observe(self.ranks, step)
        if self.allocation.hold is not None:
            self.allocation.hold(self.ranks)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        due = [decision for decision in self.decisions[self.decided :] if decision.step <= step + 1]
        if due:  # several after steps that were skipped
            self.allocation.rule(self.ranks, self.allocation.measure.scores(self.ranks), due[-1].value)
            self.ranks.memory["decided"] += len(due)
        if due and self.is_settled:
            self.ranks.memory = {
                name: self.ranks.memory[name] for name in ("decided", "on") if name in self.ranks.memory
            }

    def state(self) -> State:
        return self.ranks.memory

    def load_state(self, state: State) -> None:
        device = self.ranks.weights[0].device
        self.ranks.memory = {
            name: value.clone() if name in ("decided", "passes") else value.to(device).clone()
            for name, value in state.items()
        }

    def finish(self, contents: Contents) -> Contents:
        found = compacted(contents)
        ranks = [rank_of(factors) for part in found.values() for factors in part.layers.values()]
        log.info(
            "ranks by layer: %d to %d in %d of %d layers", min(ranks), max(ranks), len(ranks), len(self.ranks.layers)
        )
        return found
