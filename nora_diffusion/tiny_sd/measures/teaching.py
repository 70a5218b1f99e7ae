"""Can the base learn subjects? What a lesson is, its new scenes, and the independent probes that read them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...io import tensor_cache
from ...io.files import sha256
from ..examples import SCORING_KINDS, contrasting_colors, subject_object, subject_scene
from ..world import vocabulary as world
from ..world.render import render
from ..world.scenes import PROBE_SEED, Background, Scene, random_background
from . import probe
from .following import FITTED, QUESTIONS, TESTED, labeled, rendered

TAUGHT_METHODS = ("base", "lora", "nora")  # of ``evaluate --teach``
TAUGHT_SUBJECTS = ("cyclops-purple", "tiger", "backpack-green", "tractor")  # chosen before anything was trained
_NEW_KINDS = (*SCORING_KINDS, "sky", "night", "sunset")  # backgrounds that are not in the training images
TENSORS = ("weight", "bias", "mean", "std")
_EACH = 80  # rendered images of each held-out subject that the subject probe is fitted to


@dataclass(frozen=True)
class Student:
    """An adapter to train: its name in a batch, subject, method (:func:`.methods.method_settings`) and settings.

    ``settings`` override the training settings of the method. The images have the seeds ``10 s`` to ``10 s + 9`` for
    the training seed ``s``.
    """

    name: str
    subject: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Lesson:
    """One subject trained with one method: images of the new scenes, and what was measured.

    The independent probes measure the shares ``*_right``. The scores are mean cosines of the base's own judge: to other
    images of the subject, and to the prompts without the trigger. ``heldout_loss``: the denoising loss on the scoring
    images. A lesson whose training failed (``error``) has no images, shares and scores of 0 and an infinite loss.
    ``seconds``: of training; ``cpu_seconds``: of all work; each is an equal share of its batch.
    """

    subject: str
    method: str
    seconds: float
    images: list[Image.Image]
    subject_right: float = 0.0
    background_right: float = 0.0
    both_right: float = 0.0
    subject_score: float = 0.0
    prompt_score: float = 0.0
    heldout_loss: float = math.inf
    trained_parameters: int = 0
    bytes: int = 0
    cpu_seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Probes:
    """The probes for subjects (all held-out ones) and backgrounds, and their accuracy on rendered scenes."""

    network: Any
    subject: probe.Probe
    background: probe.Probe
    accuracy: dict[str, float]


def new_scenes(slug: str) -> list[Scene]:
    """Ten scenes of a subject on backgrounds that are not in its six training images."""
    backgrounds = [*map(Background, _NEW_KINDS), Background("solid", contrasting_colors(slug)[2])]
    return [subject_scene(slug, background, jitter=0) for background in backgrounds]


def fit_probes(fitted: int = FITTED, tested: int = TESTED, each: int = _EACH) -> Probes:
    """Fit both probes to blurred rendered scenes and test them on other scenes."""
    network, answer = probe.load_network(), QUESTIONS["background"]
    train, test = rendered(network, 0, fitted, soft=True), rendered(network, fitted, tested)
    background, background_accuracy = probe.fit_and_test(labeled(train, answer), labeled(test, answer))
    subject, subject_accuracy = probe.fit_and_test(
        _heldout(network, 0, each, soft=True), _heldout(network, 1, each // 4)
    )
    return Probes(network, subject, background, {"subject": subject_accuracy, "background": background_accuracy})


def cached_probes() -> Probes:
    """:func:`fit_probes`, from the disk cache unless the code or images that they depend on have changed."""
    package = Path(__file__).parents[1]
    sources = [
        *(package / "world").glob("*.py"),
        *(package / "sprites").iterdir(),
        *(package / "measures").glob("*.py"),
    ]
    digest = hashlib.sha256("".join(map(sha256, sorted(sources))).encode()).hexdigest()[:32]
    stored = tensor_cache.load(f"probes-{digest}")
    if stored is None:
        probes = fit_probes()
        values = {f"accuracy {name}": torch.tensor(share) for name, share in probes.accuracy.items()}
        for name in ("subject", "background"):
            fitted: probe.Probe = getattr(probes, name)
            values |= {f"{name} {key}": getattr(fitted, key) for key in TENSORS}
            values[f"{name} labels"] = torch.tensor(list("\n".join(fitted.labels).encode()))
        tensor_cache.store(f"probes-{digest}", values)
        return probes
    found = {}
    for name in ("subject", "background"):
        labels = bytes(stored[f"{name} labels"].tolist()).decode().split("\n")
        found[name] = probe.Probe(tuple(labels), *(stored[f"{name} {key}"] for key in TENSORS))
    accuracy = {name: float(stored[f"accuracy {name}"]) for name in found}
    return Probes(probe.load_network(), found["subject"], found["background"], accuracy)


def _heldout(network: Any, seed: int, each: int, soft: bool = False) -> probe.Labeled:
    """Features and names of the images of :func:`heldout_images`; ``soft``: of blurred images."""
    names, images = heldout_images(PROBE_SEED + seed, each)
    return probe.features(network, probe.soften(images) if soft else images), names


def heldout_images(seed: int, each: int) -> tuple[list[str], np.ndarray]:
    """The subject's name and the image of ``each`` renderings of every held-out subject on random backgrounds."""
    rng = Random(seed)
    names = [slug for slug in world.SUBJECTS for _ in range(each)]
    scenes = [Scene((subject_object(n),), random_background(rng), "", rng.getrandbits(32)) for n in names]
    return names, np.stack([render(scene) for scene in scenes])
