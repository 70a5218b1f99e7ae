"""The strategies by name."""

from __future__ import annotations

from collections.abc import Callable

from ..hooks.step_hook import StepHook
from ..hooks.trained import Trained
from .chain import Chain
from .flat import Flat
from .halora import HaLoRA
from .reslora import ResLoRA

STRATEGIES: dict[str, Callable[[Trained], StepHook]] = {
    "chain": Chain,
    "reslora": ResLoRA,
    "flat": Flat,
    "halora": HaLoRA,
}
