"""Sampling settings with their limits. Needs no torch, so that they are checked at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.untrusted import require_text
from ..pipelines.base import default_guidance, default_steps
from .samplers import check_sampler

MAX_STEPS, MAX_GUIDANCE, MAX_SIDE, MAX_PROMPT = 1000, 100, 4096, 4000
MAX_HIRES_SCALE = 4
MAX_SEED = 2**64 - 1
"""The largest seed of a PyTorch generator. Seeds stay whole numbers: a float has only 53 bits."""


@dataclass(frozen=True)
class Sampling:
    """Sampling settings shared by the images of a call.

    ``guidance`` is the scale of classifier-free guidance. ``width`` and ``height`` are in pixels (``None``: the base's
    own size). ``hires_scale``: size of a second pass, which starts from the image, as a multiple (1: none);
    ``hires_strength``: the share of the steps that it makes. ``sampler``: one of :data:`.samplers.SAMPLERS` (``None``:
    the base's own).
    """

    steps: int
    guidance: float
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    hires_scale: float = 1.0
    hires_strength: float = 0.5
    sampler: str | None = None

    @classmethod
    def for_base(
        cls, base: str | Path | None, steps: int | None = None, guidance: float | None = None, **others: Any
    ) -> Sampling:
        """The settings, with the base's default where ``steps`` or ``guidance`` is ``None``."""
        return cls(
            default_steps(base) if steps is None else steps,
            float(default_guidance(base) if guidance is None else guidance),
            **others,
        )

    def check(self, max_steps: int = MAX_STEPS, max_side: int = MAX_SIDE) -> None:
        """Raises :class:`UserError` for the first setting out of range."""
        check_range("steps", self.steps, 1, max_steps)
        check_range("guidance", self.guidance, 0, MAX_GUIDANCE)
        check_prompt(self.negative_prompt)
        check_sampler(self.sampler)
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None and not (8 <= side <= max_side and side % 8 == 0):
                raise UserError(f"{name}={side} is not possible: choose a multiple of 8 up to {max_side}")
        check_range("hires_scale", self.hires_scale, 1, MAX_HIRES_SCALE)
        if self.hires_scale > 1:
            check_strength("hires_strength", self.hires_strength, self.steps)


def check_strength(name: str, strength: float, steps: int) -> None:
    """Raises :class:`UserError` for a share of the steps out of range, or of less than one step."""
    if not 0 < strength <= 1:
        raise UserError(f"{name}={strength} is out of range: choose more than 0, up to 1")
    if steps_of(steps, strength) < 1:
        raise UserError(f"{name}={strength} of {steps} steps is less than one step: choose more of either")


def steps_of(steps: int, strength: float) -> int:
    """How many of the steps are made from an image, for a strength."""
    return min(int(steps * strength + 1e-6), steps)


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises :class:`UserError` unless ``low <= value <= high``, which NaN never is."""
    if not low <= value <= high:
        raise UserError(f"{name}={value} is out of range: choose {low} to {high}")


def check_prompt(prompt: str) -> None:
    """Raises :class:`UserError` for a prompt that is too long or is not text: with a NUL, or half of an emoji."""
    if len(prompt) > MAX_PROMPT:
        raise UserError(f"a prompt has more than {MAX_PROMPT} characters: shorten it")
    require_text(prompt, "a prompt")
