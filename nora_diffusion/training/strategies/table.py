"""The strategies by name."""

from __future__ import annotations

from collections.abc import Callable

from ..hooks.step_hook import StepHook
from ..hooks.trained import Trained
from .chain import Chain
from .flat import Flat
from .halora import HaLoRA

STRATEGIES: dict[str, Callable[[Trained], StepHook]] = {"chain": Chain, "flat": Flat, "halora": HaLoRA}
