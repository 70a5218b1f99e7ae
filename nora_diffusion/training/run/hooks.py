"""The hooks of a run, from its settings."""

from __future__ import annotations

from ...adapters.deltas.gated import GatedDelta
from ..allocation.hook import AllocationHook
from ..allocation.table import ALLOCATIONS
from ..hooks.balance import BalanceLoss, GateShares
from ..hooks.step_hook import Hooks, StepHook
from ..hooks.trained import Trained
from ..strategies.table import STRATEGIES


def hooks_of(trained: Trained) -> Hooks:
    """The hooks of a run: rank allocation, strategy and balance of a mixture, as far as they are set."""
    config = trained.plan.config
    hooks: list[StepHook] = []
    if config.rank_allocation in ALLOCATIONS:
        hooks.append(AllocationHook(trained, ALLOCATIONS[config.rank_allocation]()))
    if config.strategy != "none":
        hooks.append(STRATEGIES[config.strategy](trained))
    if weight := config.balance_loss_weight:
        is_gated = any(isinstance(layer.delta(trained.adapter), GatedDelta) for layer in trained.layers.values())
        hooks.append(GateShares(trained, weight) if is_gated else BalanceLoss(trained, weight))
    return Hooks(hooks)
