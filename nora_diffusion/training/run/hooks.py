"""The hooks of a run, from its settings."""

from __future__ import annotations

from ...adapters.deltas.gated import GatedDelta
from ..hooks.balance import BalanceLoss, GateShares
from ..hooks.step_hook import Hooks, StepHook
from ..hooks.trained import Trained
from ..strategies.table import STRATEGIES


def hooks_of(trained: Trained) -> Hooks:
    """The hooks of a run: rank allocation, strategy and balance of a mixture, as far as they are set."""
    hooks: list[StepHook] = []
    strategy = trained.plan.config.strategy
    if strategy != "none":
        hooks.append(STRATEGIES[strategy](trained))
    if weight := trained.plan.config.balance_loss_weight:
        is_gated = any(isinstance(layer.delta(trained.adapter), GatedDelta) for layer in trained.layers.values())
        hooks.append(GateShares(trained, weight) if is_gated else BalanceLoss(trained, weight))
    return Hooks(hooks)
