"""What a page may ask for, and its limits; sliders bind nobody who speaks HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from ..generation.sampling import MAX_SEED, Sampling, check_prompt, check_range
from .weights import AdapterWeights

MAX_PICTURES = 64
MAX_STEPS = 200
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
    sampling: Sampling
    adapters: tuple[Wanted, ...] = ()

    def check(self) -> None:
        """Raises :class:`UserError` for the first setting out of range; sliders bind nobody who speaks HTTP."""
        if not 1 <= len(self.pictures) <= MAX_PICTURES:
            raise UserError(f"{len(self.pictures)} pictures at once: choose 1 to {MAX_PICTURES}")
        if not all(prompt.strip() for prompt, _ in self.pictures):
            raise UserError("there is no prompt: say what the picture shall show")
        for prompt, seed in self.pictures:
            check_prompt(prompt)
            check_range("seed", seed, 0, MAX_SEED)
        self.sampling.check(MAX_STEPS, MAX_SIDE)
