"""Schedules: the curves of the papers, and that short runs have a decision as well."""

from __future__ import annotations

import math

import pytest

from nora_diffusion.training.allocation import schedules
from nora_diffusion.training.allocation.table import ALLOCATIONS


@pytest.mark.parametrize(
    ("schedule", "first", "curve"),
    [(schedules.early_cubic, 100, lambda t: (1 - t) ** 3), (schedules.late_cubic, 150, lambda t: 1 - t**3)],
)
def test_budgets_fall_along_their_curves(schedule: schedules.Schedule, first: int, curve: object) -> None:
    found = schedule(1000)
    assert found[-1] == (500, 0.0) and first < found[0].step
    values = [value for _, value in found]
    assert values == sorted(values, reverse=True) and len(set(values)) == len(values)
    for step, value in found:
        assert value == pytest.approx(curve((step - first) / (500 - first)))  # type: ignore[operator]


def test_the_kept_mass_rises_to_all_of_it() -> None:
    found = schedules.rising_mass(1200)
    assert [step for step, _ in found] == list(range(96, 1200 - 96 + 1, 96))
    for step, mass in found:
        assert mass == pytest.approx(1 - 0.05 * (1 + math.cos(math.pi * min(1, step / 800))) / 2)
    assert found[0].value == pytest.approx(0.951, abs=1e-3) and found[-1].value == 1


def test_rounds_end_with_the_first_half() -> None:
    assert [step for step, _ in schedules.in_rounds(100)] == [10, 20, 30, 40, 50]
    assert [step for step, _ in schedules.once(100)] == [5]
    assert [step for step, _ in schedules.regularly(130)] == [40, 80, 120]


@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100, 1001])
def test_decisions_are_in_order_and_inside_the_run(name: str, steps: int) -> None:
    found = [step for step, _ in ALLOCATIONS[name]().schedule(steps)]
    assert found == sorted(set(found)) and all(1 <= step <= steps for step in found)
    assert found or name in ("prilora", "beamlora")  # the others decide in every run
