"""Can the base learn subjects? An adapter to train, and what is measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

TAUGHT_METHODS = ("base", "lora", "nora")  # of ``evaluate --teach``
TAUGHT_SUBJECTS = ("cyclops-purple", "tiger", "backpack-green", "tractor")  # chosen before anything was trained
SCENES = ("scenes",)
"""The prompt sets of a lesson by default."""


@dataclass(frozen=True)
class Student:
    """An adapter to train: its name in a batch, subject, method (:func:`.methods.method_settings`) and settings.

    ``settings`` override the training settings of the method. ``subject``: one, or several joined by ``+``
    (:func:`.shown.members`). ``shown``: training images of each. ``prompts``: the sets of :data:`PROMPT_SETS` to
    generate. Their images have the seeds ``n s`` to ``n s + n - 1`` for ``n`` prompts and the training seed ``s``.
    """

    name: str
    subject: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    shown: int = 6
    prompts: Sequence[str] = SCENES


@dataclass(frozen=True)
class Lesson:
    """One subject trained with one method: images by prompt set, and what was measured.

    ``scores``: those of :mod:`.scores`, and ``heldout_loss``, the denoising loss on the scoring images. A lesson whose
    training failed (``error``) has no images, and scores of 0 where higher is better, else infinite ones. ``seconds``:
    of training; ``cpu_seconds``: of all work; each is an equal share of its batch, in which a peer is alone.
    """

    subject: str
    method: str
    seconds: float
    images: Mapping[str, list[Image.Image]] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    trained_parameters: int = 0
    bytes: int = 0
    cpu_seconds: float = 0.0
    error: str = ""
