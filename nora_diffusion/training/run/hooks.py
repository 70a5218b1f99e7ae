"""The hooks of a run, from its settings."""

from __future__ import annotations

from ..hooks.balance import BalanceLoss
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
        hooks.append(BalanceLoss(trained, weight))
    return Hooks(hooks)
