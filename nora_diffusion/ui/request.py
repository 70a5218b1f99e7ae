"""What a page may ask for, and its limits; sliders bind nobody who speaks HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from .weights import AdapterWeights

MAX_PICTURES = 64
MAX_STEPS = 200
MAX_PROMPT = 4000
MAX_SIDE = 2048


@dataclass(frozen=True)
class Wanted:
    """An adapter (a file, or ``PACK#NAME``) to generate with, under a name that is unique in the request."""

    name: str
    path: Path
    weights: AdapterWeights = field(default_factory=AdapterWeights)


@dataclass(frozen=True)
class Request:
    """Pictures to make: one for each ``(prompt, seed)`` of ``pictures``, with the same settings."""

    pictures: tuple[tuple[str, int], ...]
    adapters: tuple[Wanted, ...] = ()
    negative_prompt: str = ""
    steps: int = 20
    guidance: float = 7.5
    width: int | None = None
    height: int | None = None

    def check(self) -> None:
        """Raises :class:`UserError` for the first setting out of range; sliders bind nobody who speaks HTTP."""
        if not 1 <= len(self.pictures) <= MAX_PICTURES:
            raise UserError(f"{len(self.pictures)} pictures at once: choose 1 to {MAX_PICTURES}")
        if not all(prompt.strip() for prompt, _ in self.pictures):
            raise UserError("there is no prompt: say what the picture shall show")
        if max(len(prompt) for prompt, _ in self.pictures) > MAX_PROMPT or len(self.negative_prompt) > MAX_PROMPT:
            raise UserError(f"a prompt has more than {MAX_PROMPT} characters: shorten it")
        if not 1 <= self.steps <= MAX_STEPS:
            raise UserError(f"steps={self.steps} is out of range: choose 1 to {MAX_STEPS}")
        if not 0 <= self.guidance <= 100:  # false for NaN too
            raise UserError(f"guidance={self.guidance} is out of range: choose 0 to 100")
        if not all(0 <= seed < 2**63 for _, seed in self.pictures):
            raise UserError("a seed is out of range: choose 0 to 9223372036854775807")
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None and not (16 <= side <= MAX_SIDE and side % 8 == 0):
                raise UserError(f"{name}={side} will not do: choose a multiple of 8 from 16 to {MAX_SIDE}")
