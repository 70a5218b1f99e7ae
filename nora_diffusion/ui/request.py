"""What a page may request, and its limits. They are checked here because HTTP clients can bypass the sliders."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from ..generation.sampling import MAX_SEED, Sampling, check_prompt, check_range
from .weights import AdapterWeights

MAX_IMAGES = 64
MAX_STEPS = 200
MAX_SIDE = 2048


@dataclass(frozen=True)
class ActiveAdapter:
    """An adapter to generate with (a file, or ``PACK#NAME``), its weights, and a name that is unique in the request."""

    name: str
    path: Path
    weights: AdapterWeights = field(default_factory=AdapterWeights)


@dataclass(frozen=True)
class Request:
    """Images to generate with the same settings: one for each ``(prompt, seed)`` of ``images``."""

    images: tuple[tuple[str, int], ...]
    sampling: Sampling
    adapters: tuple[ActiveAdapter, ...] = ()

    def check(self) -> None:
        """Raise :class:`UserError` for the first value out of range."""
        if not 1 <= len(self.images) <= MAX_IMAGES:
            raise UserError(f"{len(self.images)} images were requested at once: choose 1 to {MAX_IMAGES}")
        if not all(prompt.strip() for prompt, _ in self.images):
            raise UserError("the prompt is empty: describe the image")
        for prompt, seed in self.images:
            check_prompt(prompt)
            check_range("seed", seed, 0, MAX_SEED)
        self.sampling.check(MAX_STEPS, MAX_SIDE)
