"""What a page may request, and its limits: the form's, those of an image's settings, and those of HTTP clients."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from ..generation.settings import Sampling, check_prompt, check_range
from ..generation.start_image import StartImage
from .weights import AdapterWeights

MAX_IMAGES = 64
MAX_STEPS = 200
MAX_SIDE = 2048
MAX_SCALE = 4
"""Largest side of an image, as a multiple of the base's own: beyond, bases repeat the subject, and a step can take
minutes, in which nothing can be interrupted."""
MAX_SEED = 2**53 - 1
"""Largest whole number that every browser keeps exactly."""
LIMITS: dict[str, tuple[float, float]] = {
    "count": (1, MAX_IMAGES), "seed": (-1, MAX_SEED), "steps": (1, MAX_STEPS), "guidance": (0, 30),
    "width": (0, MAX_SIDE), "height": (0, MAX_SIDE), "hires": (1, MAX_SCALE), "hires_strength": (0.1, 1),
}  # fmt: skip
"""Smallest and largest value of each number of the Generate tab. A seed of -1 is random, a side of 0 the base's own."""


@dataclass(frozen=True)
class ActiveAdapter:
    """An adapter to generate with (a file, or ``PACK#NAME``), its weights, and a name that is unique in the request."""

    name: str
    path: Path
    weights: AdapterWeights = field(default_factory=AdapterWeights)


@dataclass(frozen=True)
class Request:
    """Images to generate with the same settings: one for each ``(prompt, seed)`` of ``images``.

    ``subjects_apart``: where a prompt names the subjects of several adapters, each acts on its own subject only.
    ``start``: the image that all of them start from.
    """

    images: tuple[tuple[str, int], ...]
    sampling: Sampling
    adapters: tuple[ActiveAdapter, ...] = ()
    subjects_apart: bool = True
    start: StartImage | None = None

    def check(self, max_side: int = MAX_SIDE) -> None:
        """Raise :class:`UserError` for the first value out of range."""
        if not 1 <= len(self.images) <= MAX_IMAGES:
            raise UserError(f"{len(self.images)} images were requested at once: choose 1 to {MAX_IMAGES}")
        if not all(prompt.strip() for prompt, _ in self.images):
            raise UserError("the prompt is empty: describe the image")
        for prompt, seed in self.images:
            check_prompt(prompt)
            check_range("seed", seed, 0, MAX_SEED)
        check_range("guidance", self.sampling.guidance, *LIMITS["guidance"])
        self.sampling.check(MAX_STEPS, max_side)
        if self.start:
            self.start.check(self.sampling)
