"""Schedules: after which steps ranks are decided, and with which value.

A schedule maps the number of steps of a run to its decisions. Those of a budget have its excess as their value: from 1
(all ranks of the start) to 0 (the final budget).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class Decision(NamedTuple):
    """A decision after ``step`` steps."""

    step: int
    value: float


Schedule = Callable[[int], list[Decision]]

ADALORA_WARMUP, ADALORA_FINAL = 0.1, 0.5
"""Shares of the run before the budget shrinks and with the final one, about those of AdaLoRA on MNLI."""
DORA_WARMUP, DORA_FINAL = 0.15, 0.5
"""The same of the published code of DoRA with dynamic rank."""
SHRINKING_DECISIONS = 10
"""Decisions while the budget shrinks."""
ROUND = 0.1
"""Share of the run between decisions of ALoRA and HeteroLoRA, which end with the first half of the run."""
ONCE = 0.05
"""Share of the run that HeteroLoRA measures before it decides once."""
PRUNING_STEPS = 40
"""Steps between prunings in PRILoRA."""
BEAM_ROUND, BEAM_SHARE, BEAM_END = 0.08, 0.95, 2 / 3
"""Share of the run between decisions, mass of the kept ranks at the start, and when it reaches 1: the published
settings of BeamLoRA (every 3000 of about 37,000 steps, until step 24,688)."""


def early_cubic(steps: int) -> list[Decision]:
    """AdaLoRA's budget: the excess ``(1 - t)^3`` falls early, ``t`` from 0 after the warm-up to 1 at the final phase.

    https://arxiv.org/abs/2303.10512 (section 3.3)
    """
    return _shrinking(steps, ADALORA_WARMUP, ADALORA_FINAL, lambda t: (1 - t) ** 3)


def late_cubic(steps: int) -> list[Decision]:
    """The budget of DoRA with dynamic rank: the excess ``1 - t^3`` falls late. https://arxiv.org/abs/2405.17357"""
    return _shrinking(steps, DORA_WARMUP, DORA_FINAL, lambda t: 1 - t**3)


def _shrinking(steps: int, warmup: float, final: float, curve: Callable[[float], float]) -> list[Decision]:
    first, last = int(warmup * steps), max(1, math.ceil((1 - final) * steps))
    interval = max(1, (last - first) // SHRINKING_DECISIONS)
    found = sorted({*range(first + interval, last, interval), last})
    return [Decision(step, curve((step - first) / (last - first))) for step in found]


def in_rounds(steps: int) -> list[Decision]:
    """Every tenth of the run, in its first half."""
    interval = max(1, int(ROUND * steps))
    return [Decision(step, 0.0) for step in range(interval, max(1, steps // 2) + 1, interval)]


def once(steps: int) -> list[Decision]:
    """Once, early in the run."""
    return [Decision(max(1, int(ONCE * steps)), 0.0)]


def regularly(steps: int) -> list[Decision]:
    """Every :data:`PRUNING_STEPS` steps."""
    return [Decision(step, 0.0) for step in range(PRUNING_STEPS, steps, PRUNING_STEPS)]


def rising_mass(steps: int) -> list[Decision]:
    """BeamLoRA's mass ``p`` of the kept ranks, which rises to 1 by a cosine; not in the last round.

    ``p = 1 - (1 - p_0) (1 + cos(pi t)) / 2``, ``t`` from 0 to 1 at :data:`BEAM_END` of the run.
    https://arxiv.org/abs/2502.13604
    """
    interval = beam_interval(steps)
    found = []
    for step in range(interval, steps - interval + 1, interval):
        t = min(1.0, step / (BEAM_END * steps))
        found.append(Decision(step, 1 - (1 - BEAM_SHARE) * (1 + math.cos(math.pi * t)) / 2))
    return found


def beam_interval(steps: int) -> int:
    """The steps between two decisions of BeamLoRA."""
    return max(2, int(BEAM_ROUND * steps))
