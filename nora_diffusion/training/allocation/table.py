"""The rank allocations that act while an adapter trains: each a measure, a schedule and a rule.

A function without arguments returns each, as a preset returns a method; :data:`ALLOCATIONS` names them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import ablating, changes, measures, penalties, schedules
from .measures import Measure, Scores
from .ranks import Ranks
from .schedules import Schedule


@dataclass(frozen=True)
class Allocation:
    """``rule(ranks, scores, value)`` is applied to the scores of ``measure`` at the decisions of ``schedule``.

    ``begin``: called before the first step. ``hold``: called with the gradients of each step, after the measure.
    ``penalty``: with its weight, added to the loss; until the last decision if it is ``shrinking``.
    """

    measure: Measure
    schedule: Schedule
    rule: Callable[[Ranks, Scores, float], None]
    begin: Callable[[Ranks], None] | None = None
    hold: Callable[[Ranks], None] | None = None
    penalty: tuple[float, penalties.Penalty] | None = None
    shrinking: bool = False


def adalora() -> Allocation:
    """AdaLoRA: ``dW = (alpha/r) P diag(l) Q, l_i = 0 beyond the b most sensitive``, over all layers.

    The score of a triplet adds up smoothed ``|w dL/dw|`` and its uncertainty; the budget falls from 1.5 times the rank
    along a cubic curve, and a penalty keeps ``P`` and ``Q`` near orthogonal. https://arxiv.org/abs/2303.10512
    """
    return Allocation(
        Measure(measures.triplets, measures.observe_sensitivity), schedules.early_cubic, changes.mask_to_budget,
        begin=changes.random_pairs, penalty=(penalties.ORTHOGONALITY, penalties.orthogonality),
    )  # fmt: skip


def dynamic_dora() -> Allocation:
    """DoRA with dynamic rank: ``dW = (alpha/r) sum_i l_i b_i a_i, l_i = 0 where ||dW_i||_F / ||dW||_F is least``.

    The shares are smoothed; the budget falls from 1.5 times the rank along a cubic curve, and a penalty lowers the
    variance of the entries of each factor meanwhile. https://arxiv.org/abs/2405.17357
    """
    return Allocation(
        Measure(measures.shares, measures.observe_shares), schedules.late_cubic, changes.mask_to_budget,
        begin=changes.random_pairs, penalty=(penalties.VARIANCE, penalties.variance), shrinking=True,
    )  # fmt: skip


def alora() -> Allocation:
    """ALoRA: ``rank i moves where S(M) - S(M without i) + S(M with i alone) is least``, ``S = -loss``.

    Each decision prunes 1% of the ranks and gives as many to layers that lost none. https://arxiv.org/abs/2403.16187
    """
    return Allocation(
        Measure(ablating.ablated), schedules.in_rounds, ablating.hand_over, begin=ablating.leave_room
    )  # fmt: skip


def prilora() -> Allocation:
    """PRILoRA: ``A_ij = 0 where |A_ij| ||x_j||_2 is in the lowest half of its row``, every 40 steps.

    The rank grows linearly with the depth of the layer, from 0.5 to 1.5 times the mean. https://arxiv.org/abs/2401.11316
    """
    return Allocation(
        Measure(measures.input_weighted, measures.observe_inputs, measures.input_norms),
        schedules.regularly, changes.zero_lowest_half,
    )  # fmt: skip


def heterolora() -> Allocation:
    """HeteroLoRA: ``dW = 0 in the half of the layers where ||dL/dB||_F is least``; the others have twice the rank.

    Chosen again every tenth of the run, in its first half. https://arxiv.org/abs/2406.14956
    """
    return Allocation(
        Measure(measures.gradient_norms, measures.observe_gradients), schedules.in_rounds, changes.switch_layers,
        hold=changes.hold_off_layers,
    )  # fmt: skip


def heterolora_once() -> Allocation:
    """HeteroLoRA, once: ``dW = 0 in the half of the layers where the first ||dL/dB||_F are least``.

    https://arxiv.org/abs/2406.14956
    """
    return Allocation(
        Measure(measures.gradient_norms, measures.observe_gradients), schedules.once, changes.switch_layers,
        hold=changes.hold_off_layers,
    )  # fmt: skip


def beamlora() -> Allocation:
    """BeamLoRA: ``dW = (alpha/r) B diag(k softmax(l / T)) A, ranks beyond the top-p mass become copies of the best``.

    They are copied with their optimizer state. https://arxiv.org/abs/2502.13604
    """
    return Allocation(
        Measure(measures.rank_weights, measures.observe_beam), schedules.rising_mass, changes.copy_best
    )  # fmt: skip


ALLOCATIONS: dict[str, Callable[[], Allocation]] = {
    "adalora": adalora,
    "dynamic_dora": dynamic_dora,
    "alora": alora,
    "prilora": prilora,
    "heterolora": heterolora,
    "heterolora_once": heterolora_once,
    "beamlora": beamlora,
}
